"""What planning and committing cost: the C core beside the plain Python oracle, in one run.

    python -m tests.bench.core [--seconds 1] [--json FILE]

One "chunk" is what a session does: five plans (four denoising steps and the context pass) and one commit.
Both sides walk the same steady state: window full, bridge and two anchors present, dynamic windows 7 to 12,
at the size of the golden data (16 tokens a frame) and at 832x480 (1560). The C core works on rows, so its
cost does not grow with the frame; the oracle keeps a list of tokens. Figures are the best of several rounds, in
nanoseconds per call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from swiftvideo.runtime._core import Cache
from swiftvideo.sdk.machine import describe
from tests.runtime.core.oracle import Oracle

WINDOW, SINK, CHUNK, ANCHORS = 12, 3, 3, 4
PLANS = 5


def best_ns(work: Callable[[], object], seconds: float) -> float:
    """Nanoseconds of one `work()`: the fastest of the rounds that fit into `seconds`."""
    rounds, count, best = 0, 1, float("inf")
    deadline = time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < deadline:
        begin = time.perf_counter_ns()
        for _ in range(count):
            work()
        elapsed = time.perf_counter_ns() - begin
        best = min(best, elapsed / count)
        rounds += 1
        if elapsed < 2_000_000:
            count *= 2
    return best


def core_calls(frame_tokens: int) -> dict[str, Callable[[], object]]:
    cache = Cache(frame_tokens, WINDOW, SINK, ANCHORS)
    segments, ranges = np.zeros((6, 2), np.int32), np.zeros((4, 3), np.int32)
    spans = np.zeros((5, 3, 2), np.int32)
    at = 0

    def chunk() -> None:
        nonlocal at
        window = 7 + at % 6
        for _ in range(PLANS):
            cache.plan(at, CHUNK, window, False, segments)
        cache.commit(at, CHUNK, False, ranges)
        at += CHUNK

    def commit() -> None:
        nonlocal at
        cache.commit(at, CHUNK, False, ranges)
        at += CHUNK

    for _ in range(8):
        chunk()
    cache.set_memory(True, 2)
    return {
        "plan": lambda: cache.plan(at, CHUNK, 9, False, segments),
        "commit": commit,
        "spans": lambda: cache.spans(2, 6, spans),
        "chunk (5 plans, 1 commit)": chunk,
        "check_integrity": cache.check_integrity,
    }


def oracle_calls(frame_tokens: int) -> dict[str, Callable[[], object]]:
    oracle = Oracle(frame_tokens, WINDOW, SINK, ANCHORS)
    at = 0

    def chunk() -> None:
        nonlocal at
        window = 7 + at % 6
        for _ in range(PLANS):
            oracle.plan(at, CHUNK, window, False)
        oracle.commit(at, CHUNK, False)
        at += CHUNK

    def commit() -> None:
        nonlocal at
        oracle.commit(at, CHUNK, False)
        at += CHUNK

    for _ in range(8):
        chunk()
    oracle.bridge, oracle.anchors = True, 2
    return {
        "plan": lambda: oracle.plan(at, CHUNK, 9, False),
        "commit": commit,
        "spans": lambda: oracle.spans(2, 6),
        "chunk (5 plans, 1 commit)": chunk,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each figure")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()

    table = Table(title="Memory core: nanoseconds per call", title_justify="left")
    for column in ("tokens a frame", "call", "C core", "Python oracle", "ratio"):
        table.add_column(column, justify="left" if column == "call" else "right")
    figures: list[dict[str, object]] = []
    for frame_tokens in (16, 1560):
        slow = oracle_calls(frame_tokens)
        for name, work in core_calls(frame_tokens).items():
            core = best_ns(work, options.seconds)
            twin = best_ns(slow[name], options.seconds) if name in slow else None
            figures.append({"frame_tokens": frame_tokens, "call": name, "core_ns": core, "oracle_ns": twin})
            table.add_row(
                str(frame_tokens),
                name,
                f"{core:,.0f}",
                "" if twin is None else f"{twin:,.0f}",
                "" if twin is None else f"{twin / core:,.0f}x",
            )
    console = Console()
    console.print(table)
    if options.json:
        result = {**describe(), "figures": figures}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
