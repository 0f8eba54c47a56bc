"""`swiftvideo export` and `swiftvideo verify`: the doors to swiftvideo.export, which needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from swiftvideo.runtime.errors import SwiftVideoError, UsageError

from .inspect import show as show_bundle

INSTALL = "pip install 'swiftvideo[export]'"


class MissingPartError(SwiftVideoError):
    """A library that only some commands need is not installed."""


@contextmanager
def needing_torch(what: str) -> Iterator[None]:
    """Turn a missing library of the `export` extra into `MissingPartError`; other missing modules stay bugs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("swiftvideo"):
            raise
        raise MissingPartError(f"{what} needs {error.name}, which is not installed: {INSTALL}") from error


def export(
    checkpoint: Path | None,
    out: Path,
    *,
    random: str | None = None,
    backbone: Path | None = None,
    lora: Path | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: str = "fp32",
    full_text_encoder: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a bundle of `checkpoint`, or of random weights in the architecture `random`, and print what is in it.

    Raises:
        UsageError: not exactly one of `checkpoint` and `random`, or options that belong to the other.
        MissingPartError: torch or another library of the `export` extra is not installed.
        CheckpointError, SettingsError: see `swiftvideo.export`.
    """
    if (checkpoint is None) == (random is None):
        raise UsageError("give either CHECKPOINT or --random NAME, such as --random wan2.1-t2v-1.3b")
    if random is not None and (backbone or lora):
        raise UsageError("--backbone and --lora change a checkpoint: leave them out with --random")
    if random is None and full_text_encoder:
        raise UsageError("--full-text-encoder is for --random: a checkpoint's text encoder is always whole")
    with needing_torch("exporting"):
        from swiftvideo.export.bundle import DTYPES, export_bundle
        from swiftvideo.export.checkpoint import load_checkpoint
        from swiftvideo.export.random import random_checkpoint

        names: dict[str, Any] = dict(DTYPES.items())
        if dtype not in names:
            raise UsageError(f"--dtype is {dtype!r}: use {', '.join(names)}")
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(), console=console
        )
        with bar:
            task = bar.add_task(
                "reading the checkpoint" if random is None else "making random weights", total=None
            )
            if random is not None:
                source = random_checkpoint(random, dtype=names[dtype], full_text_encoder=full_text_encoder)
            else:
                assert checkpoint is not None
                source = load_checkpoint(checkpoint, backbone=backbone, lora=lora, dtype=names[dtype])

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
            )
    show_bundle(out, Console())
