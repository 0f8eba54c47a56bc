"""How fast, where the time goes, what a switch costs, and whether memory stays constant."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swiftvideo.runtime import Chunk, Pipeline, PromptError, Session, UsageError
from swiftvideo.runtime.geometry import Policy

from .engines import open_pipeline
from .limits import cpu_limits, gpu_of
from .machine import describe, memory_mib
from .output import check_output
from .story import LONGEST
from .work import Watched, work_figures

PROMPTS = (
    "a red circle moving right at night",
    "a yellow square moving up in the fog",
    "a blue triangle bouncing at dawn",
)
"""What is shown, unless the model does not know the words (`prompts_for`)."""
STAGES = ("denoise", "commit", "decode", "inject", "recache", "rest")
"""Parts of a chunk. commit: the context pass and the copy of its rows; rest: all that no stage claims."""
CHUNKS, FEWEST = 60, 8
"""Measured chunks unless told otherwise, and the fewest that --seconds asks for."""
BETWEEN, SWITCHES = 6, 9
"""Chunks between two measured switches, and how many of these."""
MEMORY_FROM, MEMORY_TO = 20, 400
"""Chunks after which memory is read: the first is past the warm-up, the last is the default of `measure`."""

Timed = tuple[Chunk, float]
"""A chunk and its wall-clock seconds."""
Tell = Callable[[str, int, int], object]
"""Hears which part begins, and how many of all chunks were made before it."""


def check_json(path: Path) -> Path:
    """Whether figures can be written to `path`, before measuring. Raises as `check_output`."""
    return check_output(path, (".json",))


def measure(
    bundle: Path | None = None,
    chunks: int | None = None,
    policy: Policy | None = None,
    engine: str = "auto",
    threads: int | None = None,
    memory_chunks: int = MEMORY_TO,
    seconds: float | None = None,
    tell: Tell = lambda part, done, total: None,
) -> dict[str, Any]:
    """All figures, as plain values: milliseconds unless a key says otherwise.

    chunks: measured without a switch, after a warm-up that fills the window; None: `CHUNKS`. seconds: of video, in the
    place of `chunks`. memory_chunks: the later of the two at which memory is read, the first being `MEMORY_FROM`; 0:
    memory is not measured. tell: is called between the parts, and within that of memory, where nothing is timed.

    Raises:
        UsageError: memory_chunks is neither 0 nor above `MEMORY_FROM`; or both chunks and seconds are given.
        SwiftVideoError: the bundle cannot be opened or run.
    """
    if memory_chunks and memory_chunks <= MEMORY_FROM:
        raise UsageError(f"{memory_chunks} chunks for memory: use 0, or more than {MEMORY_FROM}")
    if chunks is not None and seconds is not None:
        raise UsageError("--chunks and --seconds both say how long to measure: give one of them")
    if seconds is not None and not 0 <= seconds <= LONGEST:
        raise UsageError(f"--seconds is {seconds}: it must be in 0 to {LONGEST:.0f}")
    with open_pipeline(bundle, engine, threads) as pipeline:
        geometry, prompts = pipeline.geometry, prompts_for(pipeline)
        frames = geometry.chunk * geometry.temporal_stride
        if seconds is not None:
            chunks = max(FEWEST, math.ceil(seconds * geometry.fps / frames))
        count = chunks or CHUNKS
        used = getattr(pipeline.engine, "threads", None)
        gpu = gpu_of(pipeline.engine)
        result: dict[str, Any] = {
            **describe(),
            "gpu": gpu.name if gpu else None,
            "model": pipeline.manifest.model,
            "dtype": pipeline.manifest.dtype,
            "size": [geometry.width, geometry.height],
            "engine": pipeline.engine.name,
            "threads": used,
            "policy": policy or pipeline.settings.policy,
            "chunks": count,
            "frames_a_chunk": frames,
        }
        watched = Watched(pipeline.engine, gpu)
        warm_up = -(-geometry.window // geometry.chunk) + 2
        fewer = max(FEWEST, count // 2) if gpu else 0
        total, done = memory_chunks + warm_up + count + fewer + SWITCHES * BETWEEN, 0

        def begin(part: str, size: int) -> None:
            nonlocal done
            tell(part, done, total)
            done += size

        loaded = gpu.memory_mib() if gpu else None
        if memory_chunks:  # first: later work would raise the peak
            result["memory_mib"] = _memory(
                pipeline, prompts, policy, memory_chunks, lambda index: tell("memory", index, total)
            )
            done = memory_chunks
        begin("warm-up", warm_up)
        result["prompt_encode"] = _spread(
            [_encode_ms(pipeline, prompts[i % len(prompts)]) for i in range(12)]
        )
        with pipeline.session(prompts[0], 1, policy) as session:
            _run(session, warm_up)
            result["warm_up_chunks"] = warm_up
            watched.take()
            begin("chunks", count)
            result.update(steady_figures(_run(session, count)))
            whole = apart = watched.take(), count
            if gpu:  # what runs beside the host is only seen when the host waits for it
                begin("stages", fewer)
                with watched.waiting():
                    waited = steady_figures(_run(session, fewer))
                apart = watched.take(), fewer
                result["stages"] = waited["stages"]
                without = waited["frames_per_second"]["without_decoding"]
                result["frames_per_second"]["without_decoding"] = without
            begin("switches", SWITCHES * BETWEEN)
            result["switch"] = _switches(session, prompts)
            recaches = watched.take()
            result["attention"] = getattr(pipeline.engine, "attention", None)
            if gpu:
                result["gpu_memory_mib"] = {"weights": loaded, "one_session": gpu.memory_mib()}
        begin("limits", 0)
        result["limits"] = gpu.limits(pipeline.manifest.dtype) if gpu else cpu_limits(used)
        result["work"], result["work_unknown"] = work_figures(
            pipeline.manifest, result, whole, apart, recaches
        )
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
    pipeline: Pipeline,
    prompts: Sequence[str],
    policy: Policy | None,
    chunks: int,
    tell: Callable[[int], object],
) -> list[dict[str, Any]]:
    """Memory of this process after chunks `MEMORY_FROM` and `chunks`, with a switch every `BETWEEN` chunks."""
    rows = []
    with pipeline.session(prompts[0], 1, policy) as session:
        for index in range(chunks):
            tell(index)
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
