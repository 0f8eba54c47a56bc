"""What is in a bundle, for people."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swiftvideo.runtime import Manifest

from .harmless import harmless
from .plans import show as show_plans

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def show(folder: str | Path, console: Console) -> None:
    """Print the manifest at `folder`: the model, its sizes, its policy, its files.

    Raises BundleError, also after printing, where a file is missing or has another size.
    """
    manifest = Manifest.load(folder)
    g, policy = manifest.geometry, manifest.policy
    cache = 2 * g.layers * g.rows * g.dim * _BYTES[manifest.dtype]
    total = sum(entry.size for entry in manifest.files.values())
    facts = {
        "model": manifest.model,
        "dtype": manifest.dtype,
        "video": f"{g.width}x{g.height}, {g.fps} fps, {g.chunk * g.temporal_stride} frames a chunk",
        "backbone": f"{g.layers} layers, width {g.dim}, {g.heads} heads; {g.steps} steps and a context pass",
        "text encoder": f"{manifest.text_encoder}; width {g.text_dim}, up to {g.text_len} tokens",
        "cache": f"{g.rows} rows: window {g.window}, sink {g.sink}, {g.max_anchors} anchors; "
        f"{_size(cache)} a session",
        "policy": f"{policy.policy}, {policy.positions} positions",
        "steps at": ", ".join(f"{t:g}" for t in manifest.schedule.timesteps),
        "source": f"{manifest.source.kind}, sha256 {manifest.source.sha256[:16] or 'not recorded'}",
        "plans": str(len(manifest.plans) or "none"),
        "size": _size(total),
    }
    table = Table(show_header=False, box=None, title=Text(harmless(folder)), title_justify="left")
    for name, value in facts.items():
        table.add_row(name, Text(harmless(value)))
    console.print(table)
    files = Table(box=None)
    files.add_column("file")
    files.add_column("size", justify="right")
    files.add_column("sha256")
    for name, entry in sorted(manifest.files.items()):
        files.add_row(Text(name), _size(entry.size), entry.sha256[:16])
    console.print(files)
    show_plans(manifest, console)
    manifest.check_sizes()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
