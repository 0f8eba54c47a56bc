"""The engine's numbers against float32: every network, forwards over full caches, and whole chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from swiftvideo.export.torch_engine import TorchEngine, TorchSession
from swiftvideo.export.verify import LEVELS, RELATIVE
from swiftvideo.export.verify_inputs import segment_tables
from swiftvideo.runtime.engine import Prompt
from swiftvideo.runtime.geometry import PolicySettings
from swiftvideo.runtime.positions import rotation, time_tables

from .model import Bench, padded
from .record import Record

FORWARD = {"fp32": 1e-3, "bf16": 4e-2}
"""Largest error of x0, K and V of a forward. On the CPU in bfloat16, 30 layers of full width had 1.9e-2 at 160x160 and
1.7e-2 at 64x64, where an attention of zeros had 0.46 and one of the wrong layer 0.67."""


def numbers(bench: Bench, engine: Callable[[], TorchEngine], record: Record) -> None:
    """Relative errors by case, kept in the record's "numbers"; of frames: levels of 255."""
    pair = Pair(bench, engine)
    cases: dict[str, Callable[[], dict[str, float]]] = {"prompts": pair.conditioned}
    tables = segment_tables(bench.geometry, bench.geometry.chunk)
    tables["whole window"] = [(int(a), int(n)) for a, n in bench.table(bench.geometry.window)]
    for step, (name, rows) in enumerate(tables.items()):
        cases[name] = lambda step=step, rows=rows: pair.forward(bench.geometry.chunk, step, rows)  # type: ignore[misc]
    cases |= {
        f"recache of {bench.geometry.window} frames": pair.recache,
        "injection": pair.injected,
        "placing": pair.placed,
        "decoding": pair.decoded,
    }
    for name, work in cases.items():
        record.add("numbers", name, work=work)
    pair.close()
    record.add("numbers", "chunks", work=pair.chunks)


class Pair:
    """The engine and the reference, a prompt pair and a session of each."""

    def __init__(self, bench: Bench, engine: Callable[[], TorchEngine]) -> None:
        self.bench, self._engine = bench, engine

    @cached_property
    def engines(self) -> tuple[TorchEngine, TorchEngine]:
        """Ours first, as everywhere here."""
        return self._engine(), self.bench.reference()

    @cached_property
    def prompts(self) -> list[list[Prompt]]:
        """Two, each on both engines."""
        return [[self.bench.prompt(engine, seed) for engine in self.engines] for seed in (1, 2)]

    @cached_property
    def sessions(self) -> list[TorchSession]:
        """With the same full caches."""
        opened = [engine.open() for engine in self.engines]
        self.bench.fill(opened)
        return opened

    def conditioned(self) -> dict[str, float]:
        """K, V and signature of a prompt."""
        ours, theirs = self.prompts[0]
        self.bench.wait()
        return {
            "signature": error(ours.signature, theirs.signature),
            "cross_k": error(ours.cross[0], theirs.cross[0]),
            "cross_v": error(ours.cross[1], theirs.cross[1]),
        }

    def forward(self, frames: int, step: int, rows: Sequence[tuple[int, int]]) -> dict[str, float]:
        """One forward over `frames` frames."""
        g, last = self.bench.geometry, step == self.bench.geometry.steps
        noise = None if last else self.bench.latents(frames, 6)
        for session, prompt in zip(self.sessions, self.prompts[0], strict=True):
            session.load(self.bench.latents(frames, 5))
            session.denoise(step, noise, *time_tables(30, frames, g.time_pairs), padded(rows), prompt)
        ours, theirs = self.sessions
        assert ours.fresh is not None and theirs.fresh is not None
        found = {"x0": error(ours.x0(), theirs.x0())}
        self.bench.wait()
        for name, a, b in zip(("fresh_k", "fresh_v"), ours.fresh, theirs.fresh, strict=True):
            found[name] = error(a, b)
        return found

    def recache(self) -> dict[str, float]:
        """A window at once, which is not captured."""
        g = self.bench.geometry
        found = self.forward(g.window, g.steps, [(2, 1), (g.rows, g.window * g.frame_tokens)])
        for session in self.sessions:
            session.fresh = None  # 10 GiB at full size, which the reference's convolutions can use
        return found

    def injected(self) -> dict[str, float]:
        """Bridge and anchor."""
        g, (old, new) = self.bench.geometry, [pair[1].signature for pair in self.prompts]
        first, tokens = g.memory_rows, g.frame_tokens
        spans = np.zeros((5, 3, 2), np.int32)
        spans[:, 0] = [
            (first + k * tokens, n * tokens) for k, n in ((5, 1), (4, 1), (4, 2), (0, g.sink), (3, 3))
        ]
        made = [s.inject(spans, old, new, np.full(1, 0.6, np.float32), 0.35) for s in self.sessions]
        return {
            name: error(*pair)
            for name, pair in zip(("bridge", "anchor"), zip(*made, strict=True), strict=True)
        }

    def placed(self) -> dict[str, float]:
        """Keys of sink and memory, turned in time."""
        g = self.bench.geometry
        for session in self.sessions:
            session.place_sink(*rotation(17, g.time_pairs))
            session.place_memory(*rotation(17, g.time_pairs))
        self.bench.wait()
        end = g.memory_rows + g.sink * g.frame_tokens
        ours, theirs = (session.cache_k[:, :, :end] for session in self.sessions)
        return {"placed keys": error(ours, theirs)}

    def decoded(self) -> dict[str, float]:
        """The first frame, then a chunk."""
        found = {}
        for frames in (1, self.bench.geometry.chunk):
            ours, theirs = (session.decode(self.bench.latents(frames, 7)) for session in self.sessions)
            found[f"levels of {frames} latent frames"] = float(np.abs(ours.astype(int) - theirs).max())
        return found

    def chunks(self) -> dict[str, float]:
        """Latents of three chunks from nothing."""
        rollouts = [
            self.bench.roll(engine, prompt, PolicySettings())
            for engine, prompt in zip(self.engines, self.prompts[0], strict=True)
        ]
        found = {
            f"latents after {number} chunks": error(*(rollout.advance().latents for rollout in rollouts))
            for number in (1, 2, 3)
        }
        for rollout in rollouts:
            rollout.close()
        return found

    def close(self) -> None:
        """Free the sessions."""
        for session in self.__dict__.pop("sessions", ()):
            session.close()


def error(ours: Any, theirs: Any) -> float:
    """Largest difference over the reference's largest value, computed where they are."""
    a, b = (torch.as_tensor(x).float() for x in (ours, theirs))
    return float((a - b).abs().max() / b.abs().max())


def passed(found: dict[str, dict[str, Any]], dtype: str) -> bool:
    """Whether there are errors, and every one is within that dtype's; what failed is a text, not a number."""
    return bool(found) and all(
        isinstance(value, float) and value <= limit(name, dtype)
        for case in found.values()
        for name, value in case.items()
    )


def limit(name: str, dtype: str) -> float:
    """Largest error of an output (swiftvideo.export.verify, but tighter for forwards over the full cache)."""
    kinds = LEVELS if "levels" in name else FORWARD if name in ("x0", "fresh_k", "fresh_v") else RELATIVE
    return kinds[dtype]
