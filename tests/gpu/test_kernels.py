"""The program for GPUs: it says so where there is none, and its tables are those of the memory cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="kernels need triton")

from swiftvideo.runtime._core import Cache  # noqa: E402

from . import kernels  # noqa: E402


def test_it_refuses_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-m", "tests.gpu.kernels"], cwd=root, capture_output=True, text=True, check=False
    )
    assert child.returncode == 2
    assert "needs an NVIDIA GPU" in child.stderr and "docs/hardware.md" in child.stderr
    assert not child.stdout


def test_on_the_gpu_all_numbers_are_right() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU that torch can use")
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-m", "tests.gpu.kernels"], cwd=root, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize("window", range(7, 13))
def test_the_measured_tables_have_the_caches_lengths(window: int) -> None:
    """As many keys as the C core lists for a late chunk with bridge and anchors, in pieces of the same lengths."""
    cache = Cache(kernels.P, kernels.WINDOW, kernels.SINK, kernels.ANCHORS)
    table, ranges = np.zeros((6, 2), np.int32), np.zeros((4, 3), np.int32)
    for start in range(0, 24, kernels.CHUNK):
        cache.plan(start, kernels.CHUNK, kernels.WINDOW, False, table.data)
        cache.commit(start, kernels.CHUNK, False, ranges.data)
    cache.set_memory(True, kernels.ANCHORS)
    keys = cache.plan(24, kernels.CHUNK, window, False, table.data)
    ours = kernels.segments(window)
    assert keys == sum(length for _, length in ours)
    theirs = [(a, n) for a, n in table.tolist() if n]
    first = kernels.ROWS

    def lengths(pieces: list[tuple[int, int]]) -> tuple[int, int]:
        fresh = sum(n for a, n in pieces if a >= first)
        return fresh, sum(n for a, n in pieces) - fresh

    assert lengths(ours) == lengths(theirs)
