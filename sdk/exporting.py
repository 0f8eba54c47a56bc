"""`swiftvideo export` and `swiftvideo verify`: the doors to swiftvideo.export, which needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from swiftvideo.runtime.errors import SwiftVideoError, UsageError

from .harmless import harmless
from .inspect import show as show_bundle
from .parts import needing
from .plans import build as build_plans, check_targets


class MismatchError(SwiftVideoError):
    """An engine computes something else than the torch reference."""


def export(
    checkpoint: Path | None,
    out: Path,
    *,
    random: str | None = None,
    backbone: Path | None = None,
    lora: Path | None = None,
    lora_alpha: float | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    full_text_encoder: bool = False,
    overwrite: bool = False,
    targets: list[str] | None = None,
    plugins: bool = True,
) -> None:
    """Write a bundle of `checkpoint`, or of random weights in the architecture `random`, and print what is in it.

    targets: TensorRT plans to build too; with neither `checkpoint` nor `random`, for the bundle that `out` holds.

    What can be checked without weights is checked before any are read: the destination, the size, the targets.

    Raises:
        UsageError: not exactly one of `checkpoint` and `random`, or options that belong to the other.
        MissingPartError: torch or another library of the `export` extra is not installed.
        CheckpointError, SettingsError, EngineUnavailableError, BundleWriteError: see `swiftvideo.export`.
    """
    check_targets(targets or [])
    changes = {"--backbone": backbone, "--lora": lora, "--lora-alpha": lora_alpha}
    if targets and checkpoint is None and random is None:
        sizes = {"--height": height, "--width": width, "--dtype": dtype}
        flags = {"--full-text-encoder": full_text_encoder or None, "--overwrite": overwrite or None}
        if given := _given(changes | sizes | flags):
            raise UsageError(
                f"{given} without CHECKPOINT: --target alone adds plans to the bundle that is there, as it is; give "
                "CHECKPOINT to export one, or leave them out"
            )
        with needing("export", "building plans"):
            build_plans(out, targets, plugins, Console())
        return
    if (checkpoint is None) == (random is None):
        raise UsageError("give either CHECKPOINT or --random NAME, such as --random wan2.1-t2v-1.3b")
    if random is not None and (given := _given(changes)):
        raise UsageError(f"{given} with --random: they change a checkpoint, leave them out")
    if random is None and full_text_encoder:
        raise UsageError("--full-text-encoder is for --random: a checkpoint's text encoder is always whole")
    if lora is None and lora_alpha is not None:
        raise UsageError("--lora-alpha without --lora: give the adapter too, or leave it out")
    if not plugins and not targets:
        raise UsageError("--no-plugins without --target: it is about plans, leave it out")
    dtype = "fp32" if dtype is None else dtype
    with needing("export", "exporting"):
        from swiftvideo.export.bundle import DTYPES, export_bundle
        from swiftvideo.export.checkpoint import load_checkpoint, read_outline
        from swiftvideo.export.destination import check_destination
        from swiftvideo.export.random import random_checkpoint, random_outline
        from swiftvideo.export.tensorrt import check_buildable

        names: dict[str, Any] = dict(DTYPES.items())
        if dtype not in names:
            raise UsageError(f"--dtype is {dtype!r}: use {', '.join(names)}")
        check_destination(out, overwrite)
        if random is not None:
            outline = random_outline(random)
        elif checkpoint is not None:
            outline = read_outline(checkpoint)
        head_dim = outline.geometry(height, width).head_dim
        for target in targets or []:
            check_buildable(target, dtype, head_dim)
        with _bar() as bar:
            task = bar.add_task(
                "reading the checkpoint" if random is None else "making random weights", total=None
            )
            if random is not None:
                source = random_checkpoint(random, dtype=names[dtype], full_text_encoder=full_text_encoder)
            elif checkpoint is not None:
                source = load_checkpoint(
                    checkpoint, backbone=backbone, lora=lora, lora_alpha=lora_alpha, dtype=names[dtype]
                )

            def advance(graph: str, done: int, total: int) -> None:
                bar.update(task, description=f"{done}/{total} graphs, {graph}", completed=done, total=total)

            export_bundle(
                source,
                out,
                height=height,
                width=width,
                dtype=dtype,  # type: ignore[arg-type]
                overwrite=overwrite,
                progress=advance,
                consume=True,
            )
        if targets:
            build_plans(out, targets, plugins, Console())
    show_bundle(out, Console())


def verify(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    backbone: Path | None = None,
    lora: Path | None = None,
    lora_alpha: float | None = None,
    graphs: list[str] | None = None,
    threads: int | None = None,
    as_json: bool = False,
) -> None:
    """Compare `bundle` with the torch reference on every engine and print the errors, as a table or as JSON.

    Raises:
        MismatchError: an error exceeds its tolerance; the table was printed.
        UsageError: `backbone`, `lora` or `lora_alpha` without `checkpoint`.
        MissingPartError: torch or another library of the `export` extra is not installed.
        BundleError, EngineUnavailableError, SettingsError: see `swiftvideo.export.verify.verify_bundle`.
    """
    given = _given({"--backbone": backbone, "--lora": lora, "--lora-alpha": lora_alpha})
    if checkpoint is None and given:
        raise UsageError(f"{given} without --checkpoint: they change one, give it too, or leave them out")
    with needing("export", "verifying"):
        from swiftvideo.export.bundle import DTYPES
        from swiftvideo.export.checkpoint import load_checkpoint
        from swiftvideo.export.verify import verify_bundle
        from swiftvideo.runtime import Manifest

        with _bar(enabled=not as_json) as bar:
            task = bar.add_task("reading", total=None)
            dtype = DTYPES[Manifest.load(bundle).dtype]
            source = (
                None
                if checkpoint is None
                else load_checkpoint(
                    checkpoint, backbone=backbone, lora=lora, lora_alpha=lora_alpha, dtype=dtype
                )
            )

            def advance(graph: str, done: int, total: int) -> None:
                bar.update(task, description=f"{done}/{total} graphs, {graph}", completed=done, total=total)

            report = verify_bundle(bundle, source, graphs=graphs, threads=threads, progress=advance)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        _show(report, Console())
    if report.failures:
        worst = max(report.failures, key=lambda check: check.error / check.tolerance)
        raise MismatchError(
            f"{len(report.failures)} of {len(report.checks)} outputs differ from the torch reference by more than "
            f"their tolerance, most of all {worst.output} of {worst.graph} ({worst.case}) on {worst.engine}: "
            f"{worst.error:.2g}, allowed {worst.tolerance:.2g}. Export the bundle again; if it stays, report it"
        )


def _given(options: dict[str, Any]) -> str:
    """Names of the options that were given, for messages."""
    return ", ".join(name for name, value in options.items() if value is not None)


def _show(report: Any, console: Console) -> None:
    """A row for the worst output of every run."""
    table = Table(box=None, title=f"{report.bundle}, reference: torch with {report.weights} weights")
    table.title_justify = "left"
    for column in ("graph", "case", "engine", "worst output"):
        table.add_column(column)
    for column in ("error", "allowed", ""):
        table.add_column(column, justify="right")
    runs: dict[tuple[str, str, str], list[Any]] = {}
    for check in report.checks:
        runs.setdefault((check.graph, check.case, check.engine), []).append(check)
    for (graph, case, engine), checks in runs.items():
        worst = max(checks, key=lambda check: check.error / check.tolerance)
        unit = " of 255" if worst.output == "frames" else ""
        verdict = "ok" if worst.passed else "[red]DIFFERS[/red]"
        table.add_row(
            graph,
            case,
            engine,
            worst.output,
            f"{worst.error:.1e}{unit}",
            f"{worst.tolerance:g}{unit}",
            verdict,
        )
    console.print(table)
    console.print("Errors are the largest difference over the largest value; of frames, levels of 255.")
    for engine, reason in report.unavailable.items():
        console.print(f"{engine}: not compared. {harmless(reason)}", markup=False)


def _bar(enabled: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )
