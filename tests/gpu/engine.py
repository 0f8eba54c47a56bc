"""The torch engine on a GPU at full size: numbers against float32, then times, each optimisation, and a profile.

    python -m tests.gpu.engine --json engine.json              # Wan 1.3B, 832x480, bfloat16, random weights
    python -m tests.gpu.engine --rehearse                      # a tiny model on the CPU: does this program run?

Random weights cost what real ones cost. The reference is the plain torch engine with the same weights in float32. Every
figure is written as it comes; one that fails is kept as its traceback, and the others follow (docs/hardware.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from swiftvideo.export.cuda import Attention, CudaEngine, Options
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime.geometry import BridgeSettings, PolicySettings, WindowSettings
from swiftvideo.runtime.positions import time_tables
from swiftvideo.sdk.limits import Gpu, cpu_limits, gpu_of
from swiftvideo.sdk.machine import describe

from .convolutions import convolutions
from .model import HEIGHT, MODEL, WIDTH, Bench
from .numbers import numbers, passed
from .record import Record

WORK = Path(__file__).parents[2] / "docs" / "figures" / "work-wan2.1-t2v-1.3b-480x832.json"
"""What `swiftvideo.export.predict` counts for the model, which takes minutes."""
WHOLE = WindowSettings(enabled=False)
"""A switch widens the window; with a whole one always, what is measured is the switch."""
SWITCHES = {
    "bridge": PolicySettings(bridge=BridgeSettings(tau_low=2.0, tau_high=2.0), window=WHOLE),
    "full recache": PolicySettings(policy="recache", window=WHOLE),
}
VIDEOS: dict[str, tuple[PolicySettings, int | None, int]] = {
    "without_vae": (PolicySettings(), None, 1000),
    "with_vae": (PolicySettings(), 0, 1000),
    "with_vae, beside the next chunk": (PolicySettings(), 1, 60),
    "without_vae, whole window": (PolicySettings(window=WHOLE), None, 60),
}
"""Settings, chunks that decoding may be behind (None: there is none), most chunks."""
ABLATIONS: dict[str, tuple[Options, tuple[str, ...]]] = {
    "all": (Options(), ("forward", "decode")),
    "attention by the kernel": (Options(attention="kernel"), ("forward",)),
    "attention by cuDNN": (Options(attention="cudnn"), ("forward",)),
    "no graph": (Options(graphs=False), ("forward",)),
    "no torch.compile": (Options(compiled=False), ("forward", "decode")),
    "GELU after its product": (Options(joined_gelu=False), ("forward",)),
    "K and V copied to their places": (Options(placed_keys=False), ("forward",)),
    "VAE channels first": (Options(channels_last=False), ("decode",)),
    "reference attention": (Options(graphs=False, kernels=False, attention="kernel"), ("forward",)),
    "nothing": (
        Options(
            graphs=False,
            kernels=False,
            compiled=False,
            joined_gelu=False,
            placed_keys=False,
            channels_last=False,
            attention="kernel",
        ),
        ("forward", "decode"),
    ),
}
"""What the engine is left with, and the parts that this changes."""
SWITCHED = [field.name for field in dataclasses.fields(Options) if field.default is True]
"""Options that `--without` takes: what fails on a GPU may fail for all that follows in a process."""
SLOW = 3
"""Repeats of a forward with the reference attention."""


def forward(bench: Bench, engine: TorchEngine, window: int, changed: bool = False) -> Callable[[], None]:
    """One forward over a chunk at a window of a full cache, ready to be run again and again.

    changed: as after a commit, when the keys are gathered anew; else as in the later passes of a chunk.
    """
    g, prompt = bench.geometry, bench.prompt(engine, 1)
    session, table, noise = engine.open(), bench.table(window), bench.latents(g.chunk, 6)
    bench.fill([session])
    session.load(bench.latents(g.chunk, 5))
    times = time_tables(30, g.chunk, g.time_pairs)

    def work() -> None:
        if changed:
            session.state = object()  # type: ignore[attr-defined]
        session.denoise(0, noise, *times, table, prompt)

    return work


def decoding(bench: Bench, engine: TorchEngine) -> Callable[[], None]:
    """Decoding of a later chunk, frames on the host at the end."""
    session, latents = engine.open(), bench.latents(bench.geometry.chunk, 8)
    session.decode(latents)
    return lambda: (session.decode(latents), None)[1]


def stages(
    bench: Bench, engine: Callable[[], CudaEngine], record: Record, rate: float | None, repeats: int
) -> None:
    """Milliseconds of forwards per window and of decoding; shares of `rate`, GFLOP/s of the machine's products."""
    g, work = bench.geometry, json.loads(WORK.read_text())

    def row(ready: Callable[[], None], counted: str) -> dict[str, float]:
        took, gflop = bench.seconds(ready, repeats), 1000 * work[counted]["tflop"]
        share = {} if rate is None else {"share_of_matmul": gflop / took / rate}
        return {"ms": 1000 * took, "gflop": gflop, **share}

    for window in range(7, g.window + 1):
        record.add(
            "stages",
            f"forward, window {window}",
            work=lambda window=window: row(forward(bench, engine(), window), f"one forward, window {window}"),  # type: ignore[misc]
        )
    whole = f"forward, window {g.window}"
    record.add(
        "stages",
        f"{whole}, gathering its keys",
        work=lambda: row(forward(bench, engine(), g.window, changed=True), f"one {whole}"),
    )
    record.add("attention", work=lambda: chosen(engine()))
    record.add("stages", "decode", work=lambda: row(decoding(bench, engine()), "decoding a chunk"))


def chosen(engine: CudaEngine) -> dict[str, Any]:
    """Which attention serves windows of whole frames, and what one of a layer took by either."""
    return {"chosen": engine.attention, "ms": engine.attention_ms}


def video(bench: Bench, engine: Callable[[], CudaEngine], record: Record, chunks: int) -> None:
    """Whole chunks: frames per second, cost early and late, switches, memory. "Beside": docs/decisions/0006."""
    for name, (settings, behind, most) in VIDEOS.items():
        record.add(
            "video",
            name,
            work=lambda settings=settings, behind=behind, most=most: steady(  # type: ignore[misc]
                bench, engine(), settings, behind, min(chunks, most)
            ),
        )
    record.add("video", "memory of sessions, MiB", work=lambda: sessions(bench, engine()))
    for name, settings in SWITCHES.items():
        record.add(
            "video",
            f"switch, {name}: extra ms",
            work=lambda settings=settings: switching(bench, engine(), settings),  # type: ignore[misc]
        )


def steady(
    bench: Bench, engine: CudaEngine, settings: PolicySettings, behind: int | None, chunks: int
) -> dict[str, Any]:
    """Figures of a video without switches; memory: before it, and while it is open, with its peak."""
    gpu = gpu_of(engine)
    if gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)  # numbers and captures before it held more
    before = gpu.memory_mib() if gpu else None
    rollout = bench.roll(engine, bench.prompt(engine, 1), settings)
    walls, windows, decoded, decoder = [], [], deque[Any](), ThreadPoolExecutor(1)
    for _ in range(chunks):
        begin = time.perf_counter()
        step = rollout.advance()
        if behind is not None:
            decoded.append(decoder.submit(rollout.tensors.decode, step.latents))
            while len(decoded) > behind:
                decoded.popleft().result()
        walls.append(1000 * (time.perf_counter() - begin))
        windows.append(step.window)
    for last in decoded:
        last.result()
    bench.wait()
    held = gpu.memory_mib() if gpu else None
    rollout.close()
    frames = bench.geometry.chunk * bench.geometry.temporal_stride
    early, late = (float(np.median(part)) for part in (walls[10:30], walls[-20:]))
    return {
        "frames_per_second": 1000 * frames / float(np.median(walls[10:])),
        "ms_early": early,
        "ms_late": late,
        "p99": float(np.percentile(walls[10:], 99)),
        "mean_window": float(np.mean(windows[10:])),
        "memory_mib": {"before": before, "open": held},
    }


def sessions(bench: Bench, engine: CudaEngine, count: int = 3) -> list[float]:
    """Memory that each of several sessions adds with its first chunk and its frames; none on the CPU."""
    gpu, opened, held = gpu_of(engine), [], []
    prompt = bench.prompt(engine, 1)
    for _ in range(count):
        before = gpu.memory_mib()["allocated"] if gpu else 0.0
        opened.append(bench.roll(engine, prompt, PolicySettings()))
        opened[-1].tensors.decode(opened[-1].advance().latents)
        bench.wait()
        held.append((gpu.memory_mib()["allocated"] if gpu else 0.0) - before)
    for rollout in opened:
        rollout.close()
    return held


def switching(bench: Bench, engine: CudaEngine, settings: PolicySettings) -> float:
    """Milliseconds that a chunk with a switch takes longer."""
    prompts = [bench.prompt(engine, seed) for seed in (1, 2)]
    rollout, switched, usual = bench.roll(engine, prompts[0], settings), [], []
    for number in range(24):
        if number >= 6 and number % 3 == 0:
            rollout.ask(prompts[number // 3 % 2])
        bench.wait()
        begin = time.perf_counter()
        step = rollout.advance()
        bench.wait()
        (switched if step.switch else usual if number > 8 else []).append(time.perf_counter() - begin)
    rollout.close()
    return 1000 * float(np.median(switched[1:]) - np.median(usual))


def ablations(bench: Bench, engine: Callable[[], CudaEngine], record: Record, repeats: int) -> None:
    """Milliseconds of a forward at the whole window and of decoding, where what is left out changes them."""

    def measured(options: Options, parts: Sequence[str]) -> dict[str, float]:
        changed = engine() if options == Options() else bench.engine(options)
        row = {}
        if "forward" in parts:
            times = repeats if options.kernels else min(repeats, SLOW)
            row["forward_ms"] = 1000 * bench.seconds(forward(bench, changed, bench.geometry.window), times)
        if "decode" in parts:
            row["decode_ms"] = 1000 * bench.seconds(decoding(bench, changed), repeats)
        if options != Options():
            changed.close()
        return row

    for name, (options, parts) in ABLATIONS.items():
        record.add(
            "ablations",
            name,
            work=lambda options=options, parts=parts: measured(options, parts),  # type: ignore[misc]
        )


def profile(bench: Bench, engine: CudaEngine) -> str:
    """Where a chunk's time goes, kernel by kernel. Graphs are left out: their kernels have no names of ours."""
    from torch.profiler import ProfilerActivity, profile as recording

    gpu = bench.device.type == "cuda"
    work = [forward(bench, engine, bench.geometry.window), decoding(bench, engine)]
    for one in work:
        one()
    bench.wait()
    with recording(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as made:
        for one in work:
            one()
        bench.wait()
    order = "cuda_time_total" if gpu else "cpu_time_total"
    return str(made.key_averages().table(sort_by=order, row_limit=25))


def rehearsed() -> Bench:
    """A tiny model on the CPU; shares of its stages mean nothing, for their work is the large model's."""
    from tests.export import small

    source = small.checkpoint()
    return Bench(source.backbone, source.vae, source.geometry(), source.schedule)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all figures as JSON; exit code 2 without a GPU, 1 when a number is wrong or something failed."""
    sections = ("stages", "video", "profile", "ablations", "convolutions")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--chunks", type=int, default=200, help="of each video that is timed; at least 40")
    parser.add_argument("--repeats", type=int, default=20, help="of each stage that is timed")
    parser.add_argument("--only", nargs="*", choices=sections, help="what is timed, after the numbers")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=SWITCHED, help="what the engine does without"
    )
    parser.add_argument("--attention", default="fastest", choices=get_args(Attention), help="that is used")
    parser.add_argument("--skip-numbers", action="store_true", help="they were right in an earlier run")
    parser.add_argument("--time-anyway", action="store_true", help="even where numbers are wrong")
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        print(
            f"tests.gpu.engine needs an NVIDIA GPU and a torch that uses it; torch is {torch.__version__} and sees "
            "none: run it on a machine with one, or rehearse it with --rehearse",
            file=sys.stderr,
        )
        return 2
    record = Record(given.json, {**describe(), "model": f"{MODEL}, {WIDTH}x{HEIGHT}, random weights"})
    if given.rehearse:
        record.put("model", value="tiny")
        bench = rehearsed()
        measure = functools.partial(cpu_limits, torch.get_num_threads())
    else:
        bench = Bench.full_size(torch.device("cuda"))
        measure = functools.partial(Gpu(bench.device).limits, "bf16")
    record.put("dtype", value=bench.dtype)
    record.put("without", value=given.without)
    limits = record.add("limits", work=measure)
    options = Options(**dict.fromkeys(given.without, False), attention=given.attention)
    engine = functools.cache(functools.partial(bench.engine, options))
    right = True
    if not given.skip_numbers:
        numbers(bench, engine, record)
        right = passed(record.figures["numbers"], bench.dtype)
        record.put("passed", value=right)
        record.save()
    rate = None if limits is None else limits["gflop_per_s"]
    timings: dict[str, Callable[[], Any]] = {
        "stages": lambda: stages(bench, engine, record, rate, given.repeats),
        "video": lambda: video(bench, engine, record, given.chunks),
        "profile": lambda: record.add(
            "profile", work=lambda: profile(bench, bench.engine(dataclasses.replace(options, graphs=False)))
        ),
        "ablations": lambda: ablations(bench, engine, record, given.repeats),
        "convolutions": lambda: convolutions(bench, record, rate, given.repeats),
    }
    for name in sections:
        if (right or given.time_anyway) and (not given.only or name in given.only):
            timings[name]()
    return 0 if right and not record.failed else 1


if __name__ == "__main__":
    sys.exit(main())
