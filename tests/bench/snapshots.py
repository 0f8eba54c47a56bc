"""Gaps between chunks on a server that saves one of its sessions: what a snapshot costs that session, and the others.

The embedded model's sessions are made as large as wanted by an array that goes along with their state: it is copied,
hashed and written like the rest. A slower disk is made of sleep, which takes no processor from the engine. The least
that a gap can be is one without snapshots and, where one is taken, the time of that copy.

python -m tests.bench.snapshots --megabytes 64 --seconds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swiftvideo.runtime import load, tensorfile
from swiftvideo.sdk.machine import describe
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.manager import SessionManager
from swiftvideo.sdk.server.metrics import Metrics
from swiftvideo.sdk.server.session import ServedSession
from swiftvideo.v1 import generation_pb2 as pb


def with_ballast(engine: Any, ballast: np.ndarray[Any, Any]) -> None:
    """Let the states of an engine's sessions have an array more."""
    make = engine.open

    def opened(batch: int = 1) -> Any:
        session = make(batch)
        export = session.export_state
        session.export_state = lambda: export() | {"ballast": ballast.copy()}
        return session

    engine.open = opened


def with_slow_disk(seconds: float) -> None:
    """Let every session's file take so much longer."""
    write = tensorfile.write

    def slow(path: Path, *arguments: Any) -> None:
        if path.suffix == ".session":
            time.sleep(seconds)
        write(path, *arguments)

    tensorfile.write = slow


async def played(session: ServedSession, chunks: int) -> list[float]:
    """Milliseconds between chunks, which are presented at once."""
    came = []
    while session.delivered < chunks:
        if session.delivered > session.presented:
            came.append(1000 * time.monotonic())
            session.credit(session.delivered - 1)
        await asyncio.sleep(0.001)
    return np.diff(came).tolist()


def figures(gaps: list[float], snapshots: int) -> dict[str, float]:
    """The median gap, and that of the longest ones, one for each snapshot."""
    return {"p50": float(np.median(gaps)), "longest": float(np.median(sorted(gaps)[-snapshots:]))}


async def measure(
    pipeline: Any, folder: Path, chunks: int, every: int, others: int, longest: int
) -> dict[str, Any]:
    """One session that is saved beside others that are not."""
    config = ServerConfig(snapshots=folder, snapshot_chunks=every, max_load=None)
    manager = SessionManager(pipeline, config, Metrics())
    sessions = []
    for linger in (60_000, *[0] * others):
        start = pb.Start(prompt=pipeline.words[0], credits=2, linger_ms=linger)
        sessions.append((await manager.start("bench", start, "bench"))[0])
    saved, *rest = await asyncio.gather(*(played(session, chunks) for session in sessions))
    await manager.close()
    value = manager.metrics.registry.get_sample_value
    return {
        "others": figures([gap for gaps in rest for gap in gaps], longest * others),
        "the saved one": figures(saved, longest),
        "written": value("swiftvideo_snapshots_total"),
        "missed": value("swiftvideo_snapshot_failures_total"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=64, help="that a session takes more")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="that a snapshot takes to be written, at least"
    )
    parser.add_argument("--chunks", type=int, default=100, help="of each session")
    parser.add_argument("--every", type=int, default=20, help="chunks between two snapshots")
    parser.add_argument("--others", type=int, default=2, help="sessions without snapshots")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    ballast = np.random.default_rng(0).integers(0, 1 << 32, options.megabytes << 18, np.uint32)
    copies = []
    for _ in range(5):
        begin = time.monotonic()
        ballast.copy()
        copies.append(1000 * (time.monotonic() - begin))
    with load(engine="onnxruntime", threads=1) as pipeline, tempfile.TemporaryDirectory() as folder:
        rest = options.others, options.chunks // options.every
        plain = asyncio.run(measure(pipeline, Path(folder) / "plain", options.chunks, 10**6, *rest))
        with_ballast(pipeline.engine, ballast)
        with_slow_disk(options.seconds)
        found = asyncio.run(measure(pipeline, Path(folder) / "saved", options.chunks, options.every, *rest))
    table = Table(title="Milliseconds between chunks", title_justify="left")
    for column in ("session", "snapshots", "p50", "longest, median"):
        table.add_column(column, justify="left" if column in ("session", "snapshots") else "right")
    for name, figures in (("none", plain), (f"every {options.every}", found)):
        for which in ("others", "the saved one"):
            table.add_row(which, name, *(f"{value:,.0f}" for value in figures[which].values()))
    Console().print(table)
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        copy = float(np.median(copies))
        result = {**describe(), "options": asked, "copy_ms": copy, "without": plain, "with": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
