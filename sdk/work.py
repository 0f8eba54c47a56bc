"""What an engine had to compute in a benchmark, and how near it came to what the machine allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swiftvideo.runtime import Manifest
from swiftvideo.runtime.errors import BundleError

from .limits import Gpu


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a network. keys: rows that each token saw; of decoding 0."""

    stage: str
    frames: int
    keys: int = 0


Counted = tuple[Sequence[Call], int]
"""Calls of steady chunks, and of how many chunks."""


class Watched:
    """Notes every run of the backbone and of the decoder in sessions that an engine opens from now on.

    Runs in the place of the engine's `open`. gpu: where the work may run beside the host.
    """

    def __init__(self, engine: Any, gpu: Gpu | None = None) -> None:
        self._opening = engine.open
        self._steps: int = engine.geometry.steps
        self._gpu = gpu
        self._wait = False
        self._calls: list[Call] = []
        engine.open = self._open

    def take(self) -> list[Call]:
        """Calls since the last time."""
        taken, self._calls = self._calls, []
        return taken

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the host waits for the GPU at the end of every commit, so that stages do not overlap."""
        self._wait = True
        try:
            yield
        finally:
            self._wait = False

    def _open(self, batch: int = 1) -> Any:
        tensors = self._opening(batch)
        load, denoise, commit, decode = tensors.load, tensors.denoise, tensors.commit, tensors.decode
        state: dict[str, Any] = {"frames": 0, "stage": "recache", "decoded": 0}

        def watched_load(latents: Any) -> None:
            state["frames"] = latents.shape[1]
            load(latents)

        def watched_denoise(step: int, noise: Any, cos: Any, sin: Any, segments: Any, prompt: Any) -> None:
            last = step == self._steps  # the context pass, or a recache where no step went before it
            stage = ("commit" if state["stage"] == "denoise" else "recache") if last else "denoise"
            state["stage"] = stage
            self._calls.append(Call(stage, state["frames"], int(segments[:, 1].sum())))
            denoise(step, noise, cos, sin, segments, prompt)

        def watched_commit(ranges: Any) -> None:
            commit(ranges)
            if self._wait and self._gpu is not None:
                self._gpu.wait()

        def watched_decode(latents: Any) -> Any:
            frames = latents.shape[1]
            if not state["decoded"]:
                self._calls.append(Call("decode_first", 1))
                frames -= 1
            if frames:
                self._calls.append(Call("decode", frames))
            state["decoded"] = 1
            return decode(latents)

        tensors.load, tensors.denoise = watched_load, watched_denoise
        tensors.commit, tensors.decode = watched_commit, watched_decode
        return tensors


def work_figures(
    manifest: Manifest,
    result: dict[str, Any],
    whole: Counted,
    apart: Counted,
    switching: Sequence[Call],
) -> tuple[dict[str, Any] | None, str | None]:
    """Per stage: work of a chunk, floor on this machine, and what was achieved; or None and why.

    result: `bench.measure`'s, with stages, prompt_encode and limits, which may be None. whole: what gave the time of a
    chunk; apart: what gave those of its stages. switching: of the switches. A floor is the larger of FLOP over the rate
    of matrix products and bytes over the rate of copies.
    """
    try:
        from swiftvideo.export.flops import BundleWork, Work
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("swiftvideo"):
            raise
        return None, f"counting work needs {error.name}: pip install 'swiftvideo[export]'"
    limits = result["limits"]
    if limits is None:
        return None, "the GPU's limits are measured with torch, and none that sees it is installed"
    counted = BundleWork(manifest)

    def total(some: Sequence[Call]) -> Work:
        made = Work(0, 0)
        for call in some:
            if call.stage == "decode_first":
                made += counted.decode_first()
            elif call.stage == "decode":
                made += counted.decode(call.frames)
            else:
                made += counted.denoise(call.frames, call.keys)
        return made

    def row(work: Work, per: int, ms: float) -> dict[str, float]:
        floor = 1000 * max(
            work.flop / limits["gflop_per_s"] / 1e9 / per, work.bytes / limits["gb_per_s"] / 1e9 / per
        )
        return {
            "gflop": work.flop / per / 1e9,
            "gbytes": work.bytes / per / 1e9,
            "ms": ms,
            "floor_ms": floor,
            "gflop_per_s": work.flop / per / 1e6 / ms if ms else 0.0,
            "share_of_matmul": work.flop / per / 1e6 / ms / limits["gflop_per_s"] if ms else 0.0,
            "share_of_floor": floor / ms if ms else 0.0,
        }

    try:
        rows = {}
        for stage in ("denoise", "commit", "decode"):
            own = [call for call in apart[0] if call.stage == stage]
            rows[stage] = row(total(own), apart[1], result["stages"][stage]["median"])
        rows["chunk"] = row(total(whole[0]), whole[1], result["chunk"]["median"])
        prompt = counted.text_encoder() + counted.condition()
        rows["prompt"] = row(prompt, 1, result["prompt_encode"]["median"])
        recaches = [call for call in switching if call.stage == "recache"]
        took = [mode["recache"] for mode in result["switch"].values() if mode["recache"]]
        if recaches and took:
            rows["recache"] = row(total(recaches), len(recaches), sum(took) / len(took))
    except BundleError as error:  # a bundle need not hold what can be counted
        return None, str(error)
    return rows, None
