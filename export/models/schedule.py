"""The noise schedule (algorithm.md, section 1): sigmas, timesteps and the few steps of a distilled model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.errors import SettingsError

TRAINING_STEPS = 1000
DENOISING_INDICES = (1000, 750, 500, 250)


@dataclass(frozen=True)
class Schedule:
    """Flow-matching schedule with a shift. Times run from 1000 (noise) down to 0 (clean)."""

    shift: float = 5.0
    indices: Sequence[int] = field(default=DENOISING_INDICES)
    context_noise: float = 0.0
    """t of the context pass."""

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise SettingsError(f"shift is {self.shift}: it must be positive and finite")
        if not 0 <= self.context_noise <= TRAINING_STEPS:
            raise SettingsError(
                f"context_noise is {self.context_noise}: a time of 0..{TRAINING_STEPS} is needed"
            )
        if not self.indices or any(not 0 < index <= TRAINING_STEPS for index in self.indices):
            raise SettingsError(
                f"denoising indices are {list(self.indices)}: each must be in 1..{TRAINING_STEPS}"
            )
        if any(a <= b for a, b in zip(self.indices, self.indices[1:], strict=False)):
            raise SettingsError(f"denoising indices are {list(self.indices)}: they must fall")

    @cached_property
    def sigmas(self) -> NDArray[np.float32]:
        """sigma_i, float32 [1000], falling from 1."""
        u = np.linspace(1.0, 0.0, TRAINING_STEPS + 1, dtype=np.float32)[:-1]
        shift = np.float32(self.shift)
        return shift * u / (1 + (shift - 1) * u)

    @cached_property
    def timesteps(self) -> NDArray[np.float32]:
        """t_i = 1000 sigma_i, float32 [1000]."""
        return self.sigmas * np.float32(TRAINING_STEPS)

    @cached_property
    def steps(self) -> NDArray[np.float32]:
        """Times of the denoising steps, float32: 1000, 937.5, 833.33, 625 by default."""
        extended = np.append(self.timesteps, np.float32(0))
        return extended[[TRAINING_STEPS - index for index in self.indices]]

    @cached_property
    def passes(self) -> NDArray[np.float32]:
        """Times of every pass of a chunk: `steps`, then the context pass."""
        return np.append(self.steps, np.float32(self.context_noise))

    def sigma_of(self, t: float) -> float:
        """sigma at the grid's nearest time; 0 gives 0.00498, the last of the grid."""
        return float(self.sigmas[int(np.argmin(np.abs(self.timesteps - np.float32(t))))])

    @cached_property
    def pass_sigmas(self) -> NDArray[np.float32]:
        """sigma_of each of `passes`, float32."""
        return np.array([self.sigma_of(float(t)) for t in self.passes], np.float32)
