"""Noise that can be recomputed: any chunk and step of any seed, without the ones before.

A counter-based generator (Philox4x64-10, as numpy has it) is keyed by (seed, batch item) and its 256-bit counter
starts at (0, 0, step, chunk), lowest word first. Draws of one chunk and step count up in the lowest two words, so no
two ever overlap.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .engine import Float32
from .errors import SettingsError


class NoiseSource(Protocol):
    """Where a rollout takes its noise from."""

    def draw(self, chunk: int, step: int) -> Float32:
        """Gaussian noise [B,c,C,h,w]. step 0: the chunk's start; step k: added after denoising step k - 1."""


def checked_seed(seed: int) -> int:
    """`seed` as a plain int. Raises SettingsError unless it is a whole number in 0 to 2^64 - 1."""
    try:
        whole = operator.index(seed)
    except TypeError as error:
        raise SettingsError(f"seed is {seed!r}: a whole number is needed") from error
    if not 0 <= whole < 1 << 64:
        raise SettingsError(f"seed is {whole}: it must be in 0 to 2^64 - 1")
    return whole


def philox(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> Float32:
    """Gaussian noise, float32 [B, ...]: the same for the same arguments, whatever was drawn before.

    seed: as `checked_seed` wants it. Batch item b has the key (seed, b): item 0 equals a batch of one.
    """
    seed = checked_seed(seed)
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
