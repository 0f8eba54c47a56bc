"""The torch engine on a GPU at full size: numbers against float32, then times, each optimisation, and a profile.

    python -m tests.gpu.engine --json engine.json              # Wan 1.3B, 832x480, bfloat16, random weights
    python -m tests.gpu.engine --rehearse                      # a tiny model on the CPU: does this program run?

Random weights cost what real ones cost. The reference is the plain torch engine with the same weights in float32.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swiftvideo.export.checkpoint import Checkpoint
from swiftvideo.export.cuda import CudaEngine, Options
from swiftvideo.export.random import random_checkpoint
from swiftvideo.export.torch_engine import TorchEngine, TorchSession
from swiftvideo.export.verify import LEVELS, RELATIVE
from swiftvideo.export.verify_inputs import segment_tables
from swiftvideo.runtime.engine import Int32, Prompt
from swiftvideo.runtime.geometry import BridgeSettings, Geometry, PolicySettings, WindowSettings
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.positions import rotation, time_tables
from swiftvideo.runtime.rollout import Rollout
from swiftvideo.sdk.limits import Gpu, cpu_limits, gpu_of
from swiftvideo.sdk.machine import describe

MODEL, HEIGHT, WIDTH = "wan2.1-t2v-1.3b", 480, 832
WHOLE = WindowSettings(enabled=False)
"""A switch widens the window; with a whole one always, what is measured is the switch."""
BRIDGED = PolicySettings(bridge=BridgeSettings(tau_low=2.0, tau_high=2.0), window=WHOLE)
RECACHED = PolicySettings(policy="recache", window=WHOLE)
ABLATIONS: dict[str, Options] = {
    "all": Options(),
    "no graph": Options(graphs=False),
    "no torch.compile": Options(compiled=False),
    "VAE channels first": Options(channels_last=False),
    "reference attention": Options(graphs=False, kernels=False),
    "nothing": Options(graphs=False, kernels=False, compiled=False, channels_last=False),
}


class Bench:
    """The model on both engines, and where they run."""

    def __init__(self, source: Checkpoint, geometry: Geometry, device: torch.device) -> None:
        self.source, self.geometry, self.device = source, geometry, device
        self.names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        self.dtype = self.names[source.backbone.dtype]

    def engine(self, options: Options | None = None) -> CudaEngine:
        """The engine under test, over a copy of the weights."""
        s = copy.deepcopy(self.source)
        encoder = s.text_encoder.to(self.device)
        rehearse = self.device.type == "cpu"
        return CudaEngine(
            s.backbone,
            self.geometry,
            s.schedule,
            s.vae,
            encoder,
            self.device,
            options=options,
            rehearse=rehearse,
        )

    def reference(self) -> TorchEngine:
        """Plain torch in float32."""
        s = copy.deepcopy(self.source)
        parts = s.backbone.float(), s.vae.float(), s.text_encoder.float().to(self.device)
        return TorchEngine(parts[0], self.geometry, s.schedule, parts[1], parts[2], self.device)

    def latents(self, frames: int, seed: int) -> np.ndarray:
        g = self.geometry
        shape = (1, frames, g.latent_channels, g.latent_height, g.latent_width)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def prompt(self, engine: TorchEngine, seed: int) -> Prompt:
        """Of random token ids."""
        text = self.geometry.text_len
        mask = (np.arange(text) < max(2, text // 4)).astype(np.int64)[None]
        vocabulary = self.source.text_encoder.vocabulary
        ids = np.random.default_rng(seed).integers(1, vocabulary, (1, text)) * mask
        return engine.encode(ids, mask, f"random {seed}")

    def table(self, window: int) -> Int32:
        """int32 [6,2] of a late chunk without memory rows: sink, ring, the chunk itself, window * P keys in all."""
        g = self.geometry
        sink, fresh = g.sink * g.frame_tokens, g.chunk * g.frame_tokens
        ring = window * g.frame_tokens - sink - fresh
        rows = [
            (g.memory_rows, sink),
            (g.memory_rows + sink, max(0, ring)),
            (g.rows - min(0, ring), fresh + min(0, ring)),
        ]
        return np.array(rows + [(0, 0)] * 3, np.int32)

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Mean wall-clock seconds of `work`, GPU included, after two runs that do not count."""
        for _ in range(2):
            work()
        self.wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - begin) / repeats

    def clean(self) -> None:
        """Free what nothing refers to: engines and sessions are in cycles."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def error(ours: Any, theirs: Any) -> float:
    """Largest difference over the reference's largest value."""
    a, b = (torch.as_tensor(x).double().cpu() for x in (ours, theirs))
    return float((a - b).abs().max() / b.abs().max())


def numbers(bench: Bench) -> dict[str, float]:
    """Relative errors per network and after whole chunks; of frames: levels of 255."""
    g, engines = bench.geometry, (bench.engine(), bench.reference())
    prompts = [[bench.prompt(engine, seed) for engine in engines] for seed in (1, 2)]
    found = {
        "signature": error(prompts[0][0].signature, prompts[0][1].signature),
        "cross_k": error(prompts[0][0].cross[0], prompts[0][1].cross[0]),
        "cross_v": error(prompts[0][0].cross[1], prompts[0][1].cross[1]),
    }
    sessions: list[TorchSession] = [engine.open() for engine in engines]
    bench.wait()  # their caches are cleared on streams of their own
    generator = torch.Generator(bench.device).manual_seed(3)
    for name in ("cache_k", "cache_v"):
        values = torch.randn(sessions[0].cache_k.shape, generator=generator, device=bench.device)
        for session in sessions:
            getattr(session, name).copy_(values.to(sessions[0].cache_k.dtype))
    del values
    bench.wait()
    for step, (case, rows) in enumerate(segment_tables(g, g.chunk).items()):
        table = np.array(rows + [(0, 0)] * (6 - len(rows)), np.int32)
        for session, prompt in zip(sessions, prompts[0], strict=True):
            session.load(bench.latents(g.chunk, 5))
            noise = bench.latents(g.chunk, 6)
            session.denoise(step, noise, *time_tables(30, g.chunk, g.time_pairs), table, prompt)
        found[f"x0, {case}"] = error(sessions[0].x0(), sessions[1].x0())
        for index, name in enumerate(("fresh_k", "fresh_v")):
            made = [session.fresh[index] for session in sessions if session.fresh is not None]
            found[f"{name}, {case}"] = error(made[0], made[1])
    first, tokens = g.memory_rows, g.frame_tokens
    spans = np.zeros((5, 3, 2), np.int32)
    spans[:, 0] = [(first + k * tokens, n * tokens) for k, n in ((5, 1), (4, 1), (4, 2), (0, g.sink), (3, 3))]
    arguments = (spans, prompts[0][1].signature, prompts[1][1].signature, np.full(1, 0.6, np.float32), 0.35)
    injected = [session.inject(*arguments) for session in sessions]
    for name, ours, theirs in zip(("bridge", "anchor"), *injected, strict=True):
        found[name] = error(ours, theirs)
    for session in sessions:
        session.place_sink(*rotation(17, g.time_pairs))
        session.place_memory(*rotation(17, g.time_pairs))
    bench.wait()
    end = first + g.sink * tokens
    found["placed keys"] = error(*(session.cache_k[:, :, :end] for session in sessions))
    for frames in (1, g.chunk):
        made = [session.decode(bench.latents(frames, 7)) for session in sessions]
        found[f"levels of {frames} latent frames"] = float(np.abs(made[0].astype(int) - made[1]).max())
    for session in sessions:
        session.close()
    rollouts = [
        roll(bench, engine, pair, PolicySettings())
        for engine, pair in zip(engines, zip(*prompts, strict=True), strict=True)
    ]
    for number in (1, 2, 3):
        steps = [rollout.advance().latents for rollout in rollouts]
        found[f"latents after {number} chunks"] = error(*steps)
    for rollout in rollouts:
        rollout.close()
    return found


def roll(bench: Bench, engine: TorchEngine, prompts: Sequence[Prompt], settings: PolicySettings) -> Rollout:
    """A video whose prompt is the first."""
    shape = bench.latents(bench.geometry.chunk, 0).shape
    return Rollout(engine, settings, prompts[0], PhiloxNoise(4, shape))


def forward(bench: Bench, engine: TorchEngine, window: int) -> Callable[[], None]:
    """One forward over a chunk at a window, ready to be run again and again."""
    g, prompt = bench.geometry, bench.prompt(engine, 1)
    session, table, noise = engine.open(), bench.table(window), bench.latents(g.chunk, 6)
    session.load(bench.latents(g.chunk, 5))
    times = time_tables(30, g.chunk, g.time_pairs)
    return lambda: session.denoise(0, noise, *times, table, prompt)


def decoding(bench: Bench, engine: TorchEngine) -> Callable[[], None]:
    """Decoding of a later chunk, frames on the host at the end."""
    session, latents = engine.open(), bench.latents(bench.geometry.chunk, 8)
    session.decode(latents)
    return lambda: (session.decode(latents), None)[1]


def flop(work: Callable[[], None]) -> int:
    """FLOP of the reference's work, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def stages(bench: Bench, engine: CudaEngine, limits: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of forwards per window and of decoding, with the share of the machine's matrix products."""
    g, rows = bench.geometry, {}
    per_key = 4 * g.chunk * g.frame_tokens * g.dim * g.layers  # attention over the cache, the rest is fixed

    def row(work: Callable[[], None], count: int) -> dict[str, float]:
        took = bench.seconds(work, repeats)
        rate = count / took / 1e9
        return {"ms": 1000 * took, "gflop": count / 1e9, "share_of_matmul": rate / limits["gflop_per_s"]}

    reference = TorchEngine(
        *(
            copy.deepcopy(bench.source.backbone),
            g,
            bench.source.schedule,
            copy.deepcopy(bench.source.vae),
            None,
        ),
        bench.device,
    )
    reference.text_encoder = engine.text_encoder
    smallest = max(g.sink + 1, 7 if g.window > 7 else g.chunk)
    with torch.no_grad():
        fixed = flop(forward(bench, reference, smallest)) - per_key * smallest * g.frame_tokens
        decode = flop(decoding(bench, reference))
    del reference
    bench.clean()
    for window in range(smallest, g.window + 1):
        rows[f"forward, window {window}"] = row(
            forward(bench, engine, window), fixed + per_key * window * g.frame_tokens
        )
        bench.clean()
    rows["decode"] = row(decoding(bench, engine), decode)
    return rows


def video(bench: Bench, engine: CudaEngine, chunks: int) -> dict[str, Any]:
    """Whole chunks: frames per second, cost early and late, switches, memory. "Beside": docs/decisions/0006."""
    g, prompts = bench.geometry, [bench.prompt(engine, seed) for seed in (1, 2)]
    frames = g.chunk * g.temporal_stride
    gpu = gpu_of(engine)
    result: dict[str, Any] = {"weights_mib": gpu.memory_mib() if gpu else None}
    usual, whole = PolicySettings(), PolicySettings(window=WHOLE)
    decoder = ThreadPoolExecutor(1)
    for name, settings, ahead, count in (
        ("without_vae", usual, None, chunks),
        ("with_vae", usual, 0, chunks),
        ("with_vae, beside the next chunk", usual, 1, min(chunks, 60)),
        ("without_vae, whole window", whole, None, min(chunks, 60)),
    ):
        rollout, walls, windows, decoded = roll(bench, engine, prompts, settings), [], [], deque[Any]()
        for _ in range(count):
            begin = time.perf_counter()
            step = rollout.advance()
            if ahead is not None:
                decoded.append(decoder.submit(rollout.tensors.decode, step.latents))
                while len(decoded) > ahead:
                    decoded.popleft().result()
            walls.append(1000 * (time.perf_counter() - begin))
            windows.append(step.window)
        for last in decoded:
            last.result()
        bench.wait()
        early, late = (float(np.median(part)) for part in (walls[10:30], walls[-20:]))
        result[name] = {
            "frames_per_second": 1000 * frames / float(np.median(walls[10:])),
            "ms_early": early,
            "ms_late": late,
            "p99": float(np.percentile(walls[10:], 99)),
            "mean_window": float(np.mean(windows[10:])),
        }
        rollout.close()
    result["one_session_mib"] = gpu.memory_mib() if gpu else None
    for name, settings in (("bridge", BRIDGED), ("full recache", RECACHED)):
        rollout, switched, steady = roll(bench, engine, prompts, settings), [], []
        for number in range(24):
            if number >= 6 and number % 3 == 0:
                rollout.ask(prompts[number // 3 % 2])
            bench.wait()
            begin = time.perf_counter()
            step = rollout.advance()
            bench.wait()
            (switched if step.switch else steady if number > 8 else []).append(time.perf_counter() - begin)
        result[f"switch, {name}: extra ms"] = 1000 * float(np.median(switched[1:]) - np.median(steady))
        rollout.close()
    return result


def ablations(bench: Bench, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward at the whole window and of decoding, with parts of the engine left out."""
    rows = {}
    for name, options in ABLATIONS.items():
        engine = bench.engine(options)
        window = bench.geometry.window
        rows[name] = {
            "forward_ms": 1000 * bench.seconds(forward(bench, engine, window), repeats),
            "decode_ms": 1000 * bench.seconds(decoding(bench, engine), repeats),
        }
        del engine
        bench.clean()
    return rows


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


def passed(found: dict[str, float], dtype: str) -> bool:
    """Whether every error is within that dtype's (swiftvideo.export.verify)."""
    return all(value <= (LEVELS if "levels" in name else RELATIVE)[dtype] for name, value in found.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all figures as JSON; exit code 2 without a GPU, 1 when a number is wrong: then nothing is timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--chunks", type=int, default=200, help="of each video that is timed; at least 40")
    parser.add_argument("--repeats", type=int, default=20, help="of each stage that is timed")
    parser.add_argument("--only", nargs="*", help="of stages, video, ablations, profile; numbers come first")
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        print(
            f"tests.gpu.engine needs an NVIDIA GPU and a torch that uses it; torch is {torch.__version__} and sees "
            "none: run it on a machine with one, or rehearse it with --rehearse",
            file=sys.stderr,
        )
        return 2
    if given.rehearse:
        from tests.export import small

        source = small.checkpoint()
        bench = Bench(source, source.geometry(), torch.device("cpu"))
        limits = cpu_limits(torch.get_num_threads())
    else:
        source = random_checkpoint(MODEL, dtype=torch.bfloat16)
        bench = Bench(source, source.geometry(HEIGHT, WIDTH), torch.device("cuda"))
        limits = Gpu(bench.device).limits("bf16")
    result: dict[str, Any] = {**describe(), "model": source.kind, "dtype": bench.dtype, "limits": limits}
    result["numbers"] = numbers(bench)
    result["passed"] = passed(result["numbers"], bench.dtype)
    timings: dict[str, Callable[[], Any]] = {
        "stages": lambda: stages(bench, bench.engine(), limits, given.repeats),
        "video": lambda: video(bench, bench.engine(), given.chunks),
        "ablations": lambda: ablations(bench, given.repeats),
        "profile": lambda: profile(bench, bench.engine(Options(graphs=False))),
    }
    wanted = [name for name in timings if result["passed"] and (not given.only or name in given.only)]
    for name in ("numbers", *wanted):  # told one by one, so that an interrupted run leaves something
        bench.clean()
        if name in timings:
            result[name] = timings[name]()
        print(json.dumps({name: result[name]}, indent=1), flush=True)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
