"""The end-to-end program for GPUs: it says so where the engine cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftvideo.runtime.engines import tensorrt as engine_module
from tests.tensorrt.driver import FakeDriver

from . import engine


def test_it_says_why_the_engine_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["engine", "--bundle", str(tmp_path)])
    assert engine.main() == 2
    assert "no bundle at" in capsys.readouterr().err


def test_it_needs_a_driver(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeDriver()
    driver.missing = True
    monkeypatch.setattr(engine_module, "cuda_driver", lambda: driver)
    monkeypatch.setattr("sys.argv", ["engine", "--bundle", str(tiny_bundle)])
    assert engine.main() == 2
    assert "no NVIDIA driver" in capsys.readouterr().err
