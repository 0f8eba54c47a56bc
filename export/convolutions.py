"""What makes the VAE's convolutions fast on a GPU: how they lie in memory, and which of cuDNN's algorithms run them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .models.vae import StreamingDecoder

TRIALS = 4
"""Algorithms that are tried for a convolution, those that cuDNN expects to be fastest."""


def channels_last(decoder: StreamingDecoder) -> None:
    """Lay the convolutions' weights out channels last, in place; what they compute then is laid out so too."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            wide = isinstance(module, nn.Conv3d)
            layout = torch.channels_last_3d if wide else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


@contextmanager
def fastest(tried: bool) -> Iterator[None]:
    """Whether new convolutions inside are tried with several algorithms, or take the one that cuDNN expects to be fast.

    Half a second of a core for each shape, measured: torch prepares all algorithms that there are. torch keeps
    what it found for the thread that asked: let one thread do all of them.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    _set(tried, TRIALS)
    try:
        yield
    finally:
        _set(*before)


def _set(benchmark: bool, limit: int | None) -> None:
    torch.backends.cudnn.benchmark = benchmark
    if limit is not None and torch.backends.cudnn.is_available():  # else torch has no such setting
        torch.backends.cudnn.benchmark_limit = limit
