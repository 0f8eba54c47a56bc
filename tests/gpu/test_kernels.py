"""The program for GPUs: it says so where there is none, and its tables are those of the memory cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="kernels need triton")

from swiftvideo.runtime._core import Cache  # noqa: E402

from . import attention, kernels  # noqa: E402
from .record import Record  # noqa: E402


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
    cache = Cache(attention.P, attention.WINDOW, attention.SINK, attention.ANCHORS)
    table, ranges = np.zeros((6, 2), np.int32), np.zeros((4, 3), np.int32)
    for start in range(0, 24, attention.CHUNK):
        cache.plan(start, attention.CHUNK, attention.WINDOW, False, table.data)
        cache.commit(start, attention.CHUNK, False, ranges.data)
    cache.set_memory(True, attention.ANCHORS)
    keys = cache.plan(24, attention.CHUNK, window, False, table.data)
    ours = attention.segments(window)
    assert keys == sum(length for _, length in ours)
    theirs = [(a, n) for a, n in table.tolist() if n]
    first = attention.ROWS

    def lengths(pieces: list[tuple[int, int]]) -> tuple[int, int]:
        fresh = sum(n for a, n in pieces if a >= first)
        return fresh, sum(n for a, n in pieces) - fresh

    assert lengths(ours) == lengths(theirs)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs on the CPU at small sizes; launches do nothing."""
    sizes = {"DEVICE": "cpu", "P": 8, "QUERIES": 24, "ROWS": 6 + 12 * 8, "HEADS": 2}
    spec = SimpleNamespace(compiler="none", tile=(16, 16, 128, 8))
    compiled = SimpleNamespace(kernel=SimpleNamespace(spec=spec))
    replaced = {
        "Launcher": lambda kernel: SimpleNamespace(
            run=lambda *arguments: None, slots=lambda: 132, spec=kernel.spec
        ),
        "compile_kernel": lambda *arguments: compiled,
        "milliseconds": lambda work: (work(), 1.0)[1],
        "stream": lambda: 0,
    }
    for module in (attention, kernels):
        for name, value in (sizes | replaced).items():
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "machine", lambda: {"capability": 90})
    monkeypatch.setattr(kernels, "limits", lambda: {"gflop_per_s": 1000.0})
    monkeypatch.setattr(kernels, "replayed", lambda kernel: {"relative_rms_error_by_window": {"7": 0.0}})


def test_it_runs_to_its_end_and_refuses_what_was_not_computed(without_a_gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert kernels.main(["--json", str(path)]) == 1
    made = json.loads(path.read_text())
    assert not made["failed"] and made["passed"] is False
    assert set(made["attention"]) == {f"window {window}" for window in range(7, 13)}
    row = made["attention"]["window 9"]
    assert set(row["torch"]) == {"cudnn", "flash"} and row["tflops"] == row["share_of_matmul"] > 0
    flash = row["torch"]["flash"]
    assert "refused" in flash or (flash["with_gather_ms"] > 0 and flash["relative_rms_error"] < 1e-2)


def test_one_kernel_that_fails_loses_no_other(
    without_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(kernel: Any) -> Any:
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(kernels, "injection", fails)
    path = tmp_path / "kernels.json"
    assert kernels.main(["--json", str(path)]) == 1
    made = json.loads(path.read_text())
    assert made["failed"] == ["injection"] and not made["passed"]
    assert "misaligned address" in made["injection"]["error"] and made["rows"]["commit"]["ms"] == 1


def test_tiles_that_are_wrong_or_fail_are_not_the_fastest(
    without_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"right": False, "ms": 1.0},
        {"error": "too much shared memory"},
        {"right": True, "ms": 3.0},
        {"right": True, "ms": 2.0},
        *[{"right": True, "ms": 4.0}] * len(attention.TUNING),
    ]
    monkeypatch.setattr(kernels, "tuned", lambda tiles, capability: rows.pop(0))
    record = Record(None, {})
    kernels.tune(record, 90)
    assert record.figures["fastest"] == kernels.label(attention.TUNING[3])
    assert len(record.figures["tuning"]) == len(attention.TUNING)


def test_a_tile_is_compared(without_a_gpu: None) -> None:
    """Nothing was launched, so its result is not a number."""
    made = attention.tuned(attention.TUNING[0], 90)
    assert made["right"] is False and made["ms"] == 1
