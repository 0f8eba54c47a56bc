"""How fast, where the time goes, what a switch costs, and whether memory stays constant."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from swiftvideo.runtime import Chunk, Pipeline, PromptError, Session, UsageError

from .engines import open_pipeline
from .machine import describe, memory_mib
from .video import check_output

PROMPTS = (
    "a red circle moving right at night",
    "a yellow square moving up in the fog",
    "a blue triangle bouncing at dawn",
)
"""What is shown, unless the model does not know the words (`prompts_for`)."""
STAGES = ("denoise", "commit", "decode", "inject", "recache", "rest")
"""Parts of a chunk. commit: the context pass and the copy of its rows; rest: all that no stage claims."""
BETWEEN, SWITCHES = 6, 9
"""Chunks between two measured switches, and how many of these."""
MEMORY_FROM, MEMORY_TO = 20, 400
"""Chunks after which memory is read: the first is past the warm-up, the last is the default of `measure`."""

Timed = tuple[Chunk, float]
"""A chunk and its wall-clock seconds."""


def check_json(path: Path) -> Path:
    """Whether figures can be written to `path`, before measuring. Raises as `check_output`."""
    return check_output(path, (".json",))


def measure(
    bundle: Path | None = None,
    chunks: int = 60,
    policy: str | None = None,
    engine: str = "auto",
    threads: int | None = None,
    memory_chunks: int = MEMORY_TO,
) -> dict[str, Any]:
    """All figures, as plain values: milliseconds unless a key says otherwise.

    chunks: measured without a switch, after a warm-up that fills the window. memory_chunks: the later of the two at
    which memory is read, the first being `MEMORY_FROM`; 0: memory is not measured.

    Raises:
        UsageError: memory_chunks is neither 0 nor above `MEMORY_FROM`.
        SwiftVideoError: the bundle cannot be opened or run.
    """
    if memory_chunks and memory_chunks <= MEMORY_FROM:
        raise UsageError(f"{memory_chunks} chunks for memory: use 0, or more than {MEMORY_FROM}")
    with open_pipeline(bundle, engine, threads) as pipeline:
        geometry, prompts = pipeline.geometry, prompts_for(pipeline)
        result: dict[str, Any] = {
            **describe(),
            "model": pipeline.manifest.model,
            "dtype": pipeline.manifest.dtype,
            "size": [geometry.width, geometry.height],
            "engine": pipeline.engine.name,
            "threads": getattr(pipeline.engine, "threads", None),
            "policy": policy or pipeline.settings.policy,
            "chunks": chunks,
            "frames_a_chunk": geometry.chunk * geometry.temporal_stride,
        }
        if memory_chunks:  # first: later work would raise the peak
            result["memory_mib"] = _memory(pipeline, prompts, policy, memory_chunks)
        result["prompt_encode"] = _spread(
            [_encode_ms(pipeline, prompts[i % len(prompts)]) for i in range(12)]
        )
        warm_up = -(-geometry.window // geometry.chunk) + 2
        with pipeline.session(prompts[0], 1, policy) as session:
            _run(session, warm_up)
            result["warm_up_chunks"] = warm_up
            result.update(steady_figures(_run(session, chunks)))
            result["switch"] = _switches(session, prompts)
    return result


def steady_figures(timed: Sequence[Timed]) -> dict[str, Any]:
    """Speed, and per stage median, 99th percentile and share, of chunks without a switch."""
    walls = np.array([wall for _, wall in timed])
    stages: dict[str, Any] = {}
    for stage in STAGES:
        values = [_stage_ms(chunk, wall, stage) for chunk, wall in timed]
        stages[stage] = {**_spread(values), "share": float(np.sum(values) / 1000 / walls.sum())}
    decoding = sum(_stage_ms(chunk, wall, "decode") for chunk, wall in timed) / 1000
    frames = sum(len(chunk.frames) for chunk, _ in timed)
    return {
        "chunk": _spread(walls * 1000),
        "stages": stages,
        "frames_per_second": {
            "with_decoding": float(frames / walls.sum()),
            "without_decoding": float(frames / (walls.sum() - decoding)),
        },
        "mean_window": float(np.mean([chunk.window for chunk, _ in timed])),
    }


def prompts_for(pipeline: Pipeline) -> Sequence[str]:
    """`PROMPTS`, or single words of the model's own where it does not know them, as with random weights."""
    try:
        for prompt in PROMPTS:
            pipeline.encode(prompt)
    except PromptError:
        return [word for word in pipeline.words if word.isalnum()][: len(PROMPTS)]
    return PROMPTS


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures of `measure` as a table."""
    say = functools.partial(console.print, soft_wrap=True)
    machine, speed = result["machine"], result["frames_per_second"]
    say(
        f"{result['model']} {result['size'][0]}x{result['size'][1]} {result['dtype']}, {result['engine']}, "
        f"{result['threads']} threads, policy {result['policy']}; {machine['cpu']}, {machine['cores']} cores; "
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


def _run(session: Session, chunks: int) -> list[Timed]:
    timed = []
    for _ in range(chunks):
        begin = time.perf_counter()
        chunk = next(session)
        timed.append((chunk, time.perf_counter() - begin))
    return timed


def _switches(session: Session, prompts: Sequence[str]) -> dict[str, Any]:
    """Per mode: how much longer a switch's chunk takes than the later chunks between switches (medians)."""
    switched: dict[str, list[Timed]] = {}
    steady: list[float] = []
    for number in range(SWITCHES):
        session.prompt(prompts[(number + 1) % len(prompts)])
        first, *others = _run(session, BETWEEN)
        switched.setdefault(first[0].mode, []).append(first)
        steady += [wall * 1000 for _, wall in others]
    usual = float(np.median(steady))
    result = {}
    for mode, timed in switched.items():
        walls = float(np.median([wall * 1000 for _, wall in timed]))
        parts = {
            stage: float(np.median([_stage_ms(chunk, wall, stage) for chunk, wall in timed]))
            for stage in ("inject", "recache")
        }
        result[mode] = {
            "count": len(timed),
            "chunk": walls,
            "steady_chunk": usual,
            "extra": walls - usual,
            **parts,
        }
    return result


def _memory(
    pipeline: Pipeline, prompts: Sequence[str], policy: str | None, chunks: int
) -> list[dict[str, Any]]:
    """Memory of this process after chunks `MEMORY_FROM` and `chunks`, with a switch every `BETWEEN` chunks."""
    rows = []
    with pipeline.session(prompts[0], 1, policy) as session:
        for index in range(chunks):
            if index and index % BETWEEN == 0:
                session.prompt(prompts[index // BETWEEN % len(prompts)])
            next(session)
            if index + 1 in (MEMORY_FROM, chunks):
                rows.append({"chunk": index + 1, **memory_mib()})
    return rows


def _encode_ms(pipeline: Pipeline, prompt: str) -> float:
    begin = time.perf_counter()
    pipeline.encode(prompt)
    return (time.perf_counter() - begin) * 1000


def _stage_ms(chunk: Chunk, wall: float, stage: str) -> float:
    if stage == "rest":
        return max(0.0, wall - sum(chunk.timings.values())) * 1000
    return chunk.timings.get(stage, 0.0) * 1000


def _spread(values: Any) -> dict[str, float]:
    return {"median": float(np.median(values)), "p99": float(np.percentile(values, 99))}
