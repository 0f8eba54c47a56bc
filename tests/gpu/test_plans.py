"""The program that runs plans on a GPU: it refuses without one, and what it compares on one is compared here on an
emulated GPU (tests/tensorrt/test_engine.py uses the same functions)."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from swiftvideo.runtime.engines.cuda import find_gpus
from swiftvideo.runtime.errors import EngineUnavailableError
from swiftvideo.runtime.plugins.flavours import RTX, Flavour

from . import plans


def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        find_gpus()
    except EngineUnavailableError:
        assert plans.main([]) == 2
        assert "docs/hardware.md" in capsys.readouterr().err
    else:
        assert plans.main([]) == 0


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "installed", property(lambda self: "1.0" if self is RTX else None))
    assert plans.target(89) == "rtx:sm89"
    with pytest.raises(EngineUnavailableError, match="tensorrt_rtx: no plans for compute capability 90"):
        plans.target(90)
    monkeypatch.setattr(Flavour, "installed", "1.0")
    assert plans.target(90) == "h200"
    monkeypatch.setattr(Flavour, "installed", None)
    with pytest.raises(EngineUnavailableError, match="neither"):
        plans.target(90)


def test_wrong_numbers_are_not_passed() -> None:
    good = {"latents": 1e-5, "levels": 1, "windows_differ": 0, "modes": ["bridge"]}
    verify = {"passed": True, "unavailable": {}}
    assert plans.passed({"verify": verify, "videos": {"a": good}})
    for wrong in ({"latents": float("nan")}, {"levels": 2}, {"windows_differ": 1}, {"modes": []}):
        assert not plans.passed({"verify": verify, "videos": {"a": good, "b": good | wrong}})
    assert not plans.passed({"verify": verify | {"passed": False}, "videos": {"a": good}})
    assert not plans.passed({"verify": verify | {"unavailable": {"tensorrt": "no"}}, "videos": {"a": good}})
