"""The program that measures the torch engine: it refuses without a GPU, and its rehearsal runs to the end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from . import engine  # noqa: E402


def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert engine.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "engine.json"
    arguments = ["--rehearse", "--chunks", "40", "--repeats", "1", "--json", str(path)]
    assert engine.main(arguments) == 0
    made = json.loads(path.read_text())
    assert made["passed"] and made["numbers"]["latents after 3 chunks"] < 1e-3
    assert set(made["ablations"]) == set(engine.ABLATIONS)
    assert made["video"]["with_vae"]["frames_per_second"] > 0
    assert "forward, window 12" in made["stages"] and made["profile"]


def test_wrong_numbers_are_not_passed() -> None:
    assert engine.passed({"x0": 1e-4, "levels of 3 latent frames": 1.0}, "fp32")
    assert not engine.passed({"x0": 2e-3}, "fp32")
    assert not engine.passed({"levels of 3 latent frames": 2.0}, "fp32")
    assert not engine.passed({"x0": float("nan")}, "bf16")
    assert engine.error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
