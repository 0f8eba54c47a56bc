"""`swiftvideo export --target`: TensorRT plans for a bundle, and what `swiftvideo inspect` says of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from swiftvideo.runtime import BundleIntegrityError, Manifest
from swiftvideo.runtime.plugins.flavours import parse_target
from swiftvideo.runtime.plugins.plans import PlanInfo, plans_of

from .harmless import harmless


def check_targets(targets: list[str]) -> None:
    """Raise SettingsError for a target that there is not, before any work is done."""
    for target in targets:
        parse_target(target)


def build(bundle: Path, targets: list[str], plugins: bool, console: Console) -> None:
    """Build plans for each target into the bundle, and print their sizes and times.

    Raises EngineUnavailableError, BundleError, PlanBuildError: see `swiftvideo.export.tensorrt.build_plans`.
    """
    from swiftvideo.export.tensorrt import Built, build_plans

    table = Table(box=None)
    for column in ("target", "graph", "plan", "seconds", "peak memory"):
        table.add_column(column, justify="left" if column in ("target", "graph") else "right")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bar:
        for target in targets:
            task = bar.add_task(target, total=None)

            def advance(
                graph: str, phase: str, step: int, steps: int, task: Any = task, name: str = target
            ) -> None:
                bar.update(task, description=f"{name}, {graph}: {phase}", completed=step, total=steps or None)

            built: list[Built] = build_plans(bundle, target, plugins=plugins, progress=advance)
            bar.remove_task(task)
            for item in built:
                size, peak = (f"{value / 2**20:.1f} MiB" for value in (item.size, item.peak))
                table.add_row(target, item.info.graph, size, f"{item.seconds:.1f}", peak)
    console.print(table)


def show(manifest: Manifest, console: Console) -> None:
    """Print each plan: size, plugins, precisions of its layers, bindings. Raises BundleError for a changed report."""
    for plan in plans_of(manifest):
        table = Table(show_header=False, box=None, title=Text(plan.file), title_justify="left")
        try:
            facts = _facts(manifest, plan, json.loads(bytes(manifest.read_file(plan.layers))))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise BundleIntegrityError(
                f"{plan.layers} is no report of a plan's layers ({error}): build the plans again"
            ) from error
        for name, value in facts.items():
            table.add_row(name, Text(harmless(value)))
        console.print(table)


def _facts(manifest: Manifest, plan: PlanInfo, report: Any) -> dict[str, str]:
    layers = report["layers"]
    kinds = Counter(layer["precision"] or "none" for layer in layers)
    return {
        "for": f"{plan.flavour} {plan.version}, compute capability {plan.capability}",
        "size": f"{manifest.files[plan.file].size / 2**20:.1f} MiB, {len(layers)} layers",
        "plugins": _plugins(plan, layers),
        "precisions": ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common()),
        **{
            mode + "s": _bindings([b for b in report["bindings"] if b["mode"] == mode])
            for mode in ("input", "output")
        },
    }


def _bindings(bindings: list[dict[str, Any]]) -> str:
    """Names, dtypes and shapes; of those that are counted, as a VAE's caches, the number."""
    families = Counter(b["name"].rstrip("0123456789") for b in bindings)
    shown = [
        f"{b['name']} {b['dtype']}{b['shape']}"
        for b in bindings
        if families[b["name"].rstrip("0123456789")] == 1
    ]
    return "  ".join(shown + [f"{family}0 to {count - 1}" for family, count in families.items() if count > 1])


def _plugins(plan: PlanInfo, layers: list[dict[str, Any]]) -> str:
    if plan.functions:
        return "none: built with --no-plugins"
    where = [f"{layer['name']} ({layer['precision']})" for layer in layers if layer["plugin"]]
    return "  ".join(where) or "none: the graph has none of our ops"
