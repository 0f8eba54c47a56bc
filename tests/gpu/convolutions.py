"""The VAE's convolutions over a chunk, each alone: in three dimensions, and as the three in two that it is the sum of.

cuDNN's convolutions in two dimensions may be faster than its one in three by more than what adding them costs: their
outputs written and read twice more, where the kernel that follows adds them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from swiftvideo.export.convolutions import fastest
from swiftvideo.export.models.vae import StreamingDecoder

from .model import Bench
from .record import Record

Shape = tuple[int, ...]


class Convolutions(TorchDispatchMode):
    """How often each 3x3x3 convolution runs inside: (shape of its input, of its weight) -> times."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Shape, Shape]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[1].shape[2:] == (3, 3, 3):
            self.found[tuple(args[0].shape), tuple(args[1].shape)] += 1
        return func(*args, **(kwargs or {}))


def of_a_chunk(vae: StreamingDecoder, shape: Shape) -> Counter[tuple[Shape, Shape]]:
    """Those of decoding later latents of `shape` [B,F,C,h,w], traced without data."""
    decoder, latents = copy.deepcopy(vae).to("meta"), torch.empty(shape, device="meta")
    with torch.no_grad():
        _, caches = decoder.decode_first(latents[:, :1])
        with Convolutions() as seen:
            decoder.decode(latents, caches)
    return seen.found


def in_two(x: Tensor, slices: Sequence[Tensor]) -> list[Tensor]:
    """What adds up to a causal convolution of [1,C,F+2,H,W], [F,O,H,W] each; channels last, its inputs are views."""
    frames = x[0].transpose(0, 1)
    count = len(frames) - 2
    return [functional.conv2d(frames[t : t + count], part, padding=1) for t, part in enumerate(slices)]


def convolutions(bench: Bench, record: Record, rate: float | None, repeats: int) -> None:
    """Milliseconds of each shape both ways, and shares of `rate`, GFLOP/s of the machine's products."""
    chunk = bench.latents(bench.geometry.chunk, 0).shape
    shapes = record.add("convolutions", "shapes", work=lambda: _named(of_a_chunk(bench.vae, chunk)))
    for name, (x, weight, times) in (shapes or {}).items():
        record.add(
            "convolutions",
            name,
            work=lambda x=x, weight=weight, times=times: row(bench, x, weight, times, rate, repeats),  # type: ignore[misc]
        )


def _named(found: Counter[tuple[Shape, Shape]]) -> dict[str, tuple[Shape, Shape, int]]:
    return {
        f"{w[1]} to {w[0]} channels, {x[2] - 2} frames of {x[4]}x{x[3]}": (x, w, times)
        for (x, w), times in found.items()
    }


def row(
    bench: Bench, shape: Shape, filters: Shape, times: int, rate: float | None, repeats: int
) -> dict[str, float]:
    """One shape: how often a chunk has it; GFLOP, milliseconds and shares of one; how far the ways are apart.

    The three in two dimensions are timed without being added.
    """
    x, weight = (
        torch.randn(size, device=bench.device, dtype=bench.backbone.dtype).contiguous(
            memory_format=torch.channels_last_3d
        )
        for size in (shape, filters)
    )
    slices = [weight[:, :, t].contiguous(memory_format=torch.channels_last) for t in range(3)]

    def in_three() -> Tensor:
        return functional.conv3d(x, weight, padding=(0, 1, 1))

    whole, added = in_three(), torch.stack(in_two(x, slices)).float().sum(0).transpose(0, 1)[None]
    gflop = 2e-9 * whole.numel() * weight[0].numel()
    made = {"times": times, "gflop": gflop, "difference": float((whole - added).norm() / added.norm())}
    ways: dict[str, Callable[[], object]] = {"3d": in_three, "2d": lambda: in_two(x, slices)}
    for name, way in ways.items():
        with fastest(tried=True):  # as the engine does
            seconds = bench.seconds(way, repeats)
        made[f"{name}_ms"] = 1000 * seconds
        if rate is not None:
            made[f"{name}_share"] = gflop / seconds / rate
    return made
