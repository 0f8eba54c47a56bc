"""Noise that can be recomputed: any chunk and step of any seed, without the ones before.

A counter-based generator (Philox4x64-10, as numpy has it) is keyed by (seed, batch item) and its 256-bit counter
starts at (0, 0, step, chunk), lowest word first. Draws of one chunk and step count up in the lowest two words, so no
two ever overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .engine import Float32
from .errors import SettingsError


class NoiseSource(Protocol):
    """Where a rollout takes its noise from."""

    def draw(self, chunk: int, step: int) -> Float32:
        """Gaussian noise [B,c,C,h,w]. step 0: the chunk's start; step k: added after denoising step k - 1."""


def philox(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> Float32:
    """Gaussian noise, float32 [B, ...]: the same for the same arguments, whatever was drawn before.

    seed: 0 to 2^64 - 1. Batch item b has the key (seed, b): item 0 equals a batch of one.
    """
    if not 0 <= seed < 1 << 64:
        raise SettingsError(f"seed is {seed}: it must be in 0 to 2^64 - 1")
    noise = np.empty(shape, np.float32)
    for item in range(shape[0]):
        key = np.array([seed, item], np.uint64)
        counter = np.array([0, 0, step, chunk], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        generator.standard_normal(dtype=np.float32, out=noise[item])
    return noise


@dataclass(frozen=True, slots=True)
class PhiloxNoise:
    """`philox` as a `NoiseSource`."""

    seed: int
    shape: tuple[int, ...]
    """[B,c,C,h,w]."""

    def draw(self, chunk: int, step: int) -> Float32:
        """See `NoiseSource.draw`."""
        return philox(self.seed, chunk, step, self.shape)
