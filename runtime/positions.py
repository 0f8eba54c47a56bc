"""Time part of the rotary embedding, computed in float64 for frames of any index (algorithm.md, 2.7)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROPE_BASE = 10000.0


def _frequencies(pairs: int) -> NDArray[np.float64]:
    return ROPE_BASE ** (-np.arange(pairs, dtype=np.float64) / pairs)


def time_tables(start: int, frames: int, pairs: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, float32 [frames, pairs], of latent frames start, start + 1, ...

    pairs: `Geometry.time_pairs`. Frame 10 million is as exact as frame 10.
    """
    angles = np.arange(start, start + frames, dtype=np.float64)[:, None] * _frequencies(pairs)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotation(frames: int, pairs: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin, float64 [pairs], that move a rotated key forward by `frames` latent frames.

    Rotations compose: R(a)R(b) = R(a+b).
    """
    angles = float(frames) * _frequencies(pairs)
    return np.cos(angles), np.sin(angles)
