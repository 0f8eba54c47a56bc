from __future__ import annotations

from decimal import Decimal, getcontext

import numpy as np
import pytest

from swiftvideo.runtime.positions import rotation, time_tables


@pytest.mark.parametrize("start", [0, 12, 10_000_000])
def test_tables_are_exact_for_frames_of_any_index(start: int) -> None:
    getcontext().prec = 60
    turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    cos, sin = time_tables(start, 3, 4)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == (3, 4)
    for frame in range(3):
        for pair in range(4):
            angle = float((start + frame) * Decimal(10000) ** (Decimal(-pair) / 4) % turn)
            assert cos[frame, pair] == pytest.approx(np.cos(angle), abs=2e-7)
            assert sin[frame, pair] == pytest.approx(np.sin(angle), abs=2e-7)


def test_a_rotation_moves_a_frame_forward() -> None:
    cos, sin = rotation(7, 22)
    assert cos.dtype == np.float64
    (from_cos,), (from_sin,) = time_tables(5, 1, 22)
    (to_cos,), (to_sin,) = time_tables(12, 1, 22)
    np.testing.assert_allclose(from_cos * cos - from_sin * sin, to_cos, atol=2e-7)
    np.testing.assert_allclose(from_cos * sin + from_sin * cos, to_sin, atol=2e-7)
