"""The figures of `bench.measure` for people."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for `measure`, gone at the end. It has no thread of its own, which would be measured too."""
    columns = TextColumn("{task.description:8}"), BarColumn(bar_width=24), TimeElapsedColumn()
    shown = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
    task = shown.add_task("", total=None)

    def tell(part: str, done: int, total: int) -> None:
        if shown.console.is_terminal:
            shown.start()  # not before: an empty bar leaves an empty line
            shown.update(task, description=part, completed=done, total=total, refresh=True)

    try:
        yield tell
    finally:
        if shown.live.is_started:
            shown.stop()


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures of `measure` as a table."""
    say = sayer(console)
    machine, speed = result["machine"], result["frames_per_second"]
    where = result["gpu"] or f"{result['threads']} threads"
    if result["attention"]:
        where += f", attention by the {result['attention']}"
    say(
        f"{result['model']} {result['size'][0]}x{result['size'][1]} {result['dtype']}, {result['engine']}, "
        f"{where}, policy {result['policy']}; {machine['cpu']}, {machine['cores']} cores; "
        f"commit {result['commit'] or 'unknown'}; load average {result['load_average']}"
    )
    table = Table(box=None)
    table.add_column("stage")
    for name in ("median ms", "p99 ms", "share"):
        table.add_column(name, justify="right")
    for stage, row in result["stages"].items():
        table.add_row(stage, f"{row['median']:.2f}", f"{row['p99']:.2f}", f"{row['share']:.1%}")
    chunk = result["chunk"]
    table.add_row(
        f"chunk of {result['frames_a_chunk']} frames",
        f"{chunk['median']:.2f}",
        f"{chunk['p99']:.2f}",
        "100.0%",
    )
    encode = result["prompt_encode"]
    table.add_row("a new prompt's encoding", f"{encode['median']:.2f}", f"{encode['p99']:.2f}", "once")
    console.print(table)
    say(
        f"{speed['with_decoding']:.1f} frames per second with the VAE, {speed['without_decoding']:.1f} without "
        f"({result['chunks']} chunks, mean window {result['mean_window']:.1f})"
    )
    _show_work(result, console, say)
    for mode, row in result["switch"].items():
        say(
            f"switch, {mode}: {row['extra']:+.2f} ms over a steady chunk (inject {row['inject']:.2f}, "
            f"recache {row['recache']:.2f}; {row['count']} switches)"
        )
    if "memory_mib" in result:
        first, last = result["memory_mib"]
        say(
            f"peak memory {first['peak']:.1f} MiB after chunk {first['chunk']}, {last['peak']:.1f} MiB after chunk "
            f"{last['chunk']}; resident {first['resident']:.1f} and {last['resident']:.1f} MiB"
        )
    if "gpu_memory_mib" in result:
        held = result["gpu_memory_mib"]
        most = held["one_session"].get("peak")
        say(
            f"GPU memory {held['weights']['allocated']:.0f} MiB with the weights, "
            f"{held['one_session']['allocated']:.0f} MiB with a session"
            + ("" if most is None else f", {most:.0f} MiB at most")
        )


def sayer(console: Console) -> Callable[[str], None]:
    """What prints a line as it is: `[export]` is no markup, and a line is broken by the terminal alone."""
    return functools.partial(console.print, soft_wrap=True, markup=False)


def _show_work(result: dict[str, Any], console: Console, say: Callable[[str], None]) -> None:
    limits = result["limits"]
    if result["work"] is None:
        say(f"work: not counted. {result['work_unknown']}")
        return
    table = Table(box=None)
    table.add_column("work")
    for name in ("GFLOP", "GB", "floor ms", "GFLOP/s", "of matmul", "of the floor"):
        table.add_column(name, justify="right")
    for stage, row in result["work"].items():
        table.add_row(
            stage,
            f"{row['gflop']:.4g}",
            f"{row['gbytes']:.3g}",
            f"{row['floor_ms']:.2f}",
            f"{row['gflop_per_s']:.4g}",
            f"{row['share_of_matmul']:.1%}",
            f"{row['share_of_floor']:.1%}",
        )
    console.print(table)
    say(
        f"this machine: {limits['gflop_per_s']:.4g} GFLOP/s, {limits['gb_per_s']:.4g} GB/s read and written "
        f"({limits['measured_with']})"
    )
