"""What `generate` says while it works and at its end, to people and to machines."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from swiftvideo.runtime.errors import SwiftVideoError

from .harmless import harmless
from .interrupts import Interrupts


@contextmanager
def telling(as_json: bool) -> Iterator[Bar]:
    """A bar for what is made inside, and a word where that fails or is interrupted before there is a report of it."""
    bar = Bar(enabled=not as_json)
    try:
        with Interrupts():
            try:
                yield bar
            finally:
                bar.stop()
    except KeyboardInterrupt as error:
        text = f"interrupted: {_kept(bar.report) or 'nothing was made yet'}"
        if as_json:
            _say_error("KeyboardInterrupt", text)
        else:
            typer.echo(text, err=True)
        raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from None
    except SwiftVideoError as error:
        if as_json:
            _say_error(type(error).__name__, str(error))
        if kept := _kept(bar.report):
            typer.echo(kept, err=True)
        raise


class Bar:
    """The bar on stderr: frames, frames per second, window and how the last prompt took over."""

    def __init__(self, enabled: bool) -> None:
        self.report: Any = None
        """The last one."""
        self._enabled = enabled
        self._bar = Progress(
            TextColumn("{task.fields[prompt]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._mode = ""

    def update(self, chunk: Any, report: Any) -> None:
        """Show a chunk and the report so far."""
        self.report = report
        if not self._enabled:
            return
        if self._task is None:
            self._bar.start()  # not before: an empty bar leaves an empty line
            self._task = self._bar.add_task("", total=report.planned, prompt="", state="")
        self._mode = escape(harmless(chunk.mode)) or self._mode  # a server's word
        done = f"{report.frames}/{report.planned} frames"
        state = f"{done} {report.rate:5.1f} fps  window {chunk.window:2d}  {self._mode}"
        room = self._bar.console.width - len(f"━ {state} 0:00:00") - 1  # what else is cut is the time
        most = max(8, min(40, room))
        text = report.prompt if len(report.prompt) <= most else report.prompt[: most - 1] + "…"
        self._bar.update(self._task, completed=report.frames, prompt=escape(text), state=state)

    def stop(self) -> None:
        """Leave it as it is."""
        if self._task is not None:
            self._bar.stop()


def say(report: Any, as_json: bool) -> None:
    """The outcome."""
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    if report.interrupted:
        kept = f"kept what was made in {report.video}" if report.frames else "nothing was made yet"
        typer.echo(f"interrupted after {report.frames} of {report.planned} frames: {kept}")
    if not report.frames:
        return
    for switch in report.switches:
        how = harmless(switch.mode) + ("" if switch.rho is None else f", rho {switch.rho:.2f}")
        typer.echo(f"{switch.shown:7.2f} s  {switch.prompt}  (asked for at {switch.asked:g} s; {how})")
    place = f" on {report.server}" if report.server else ""
    typer.echo(
        f"{report.video}: {_frames(report.frames)}, {report.frames / report.fps:.2f} s at {report.fps} fps, "
        f"{report.width}x{report.height}, {report.codec}; made at {report.rate:.1f} frames per second "
        f"with {harmless(report.engine)}{place}, decoding and writing included"
    )
    if report.sheet is not None:
        typer.echo(f"{report.sheet}: contact sheet")


def _say_error(kind: str, message: str) -> None:
    typer.echo(json.dumps({"error": {"type": kind, "message": message}}))


def _kept(report: Any) -> str:
    """What the file has of a video that did not come to its end; the last frames may not have reached the disk."""
    if report is None or not report.frames:
        return ""
    return f"what was made before, about {_frames(report.frames)}, is in {report.video}"


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
