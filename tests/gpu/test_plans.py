"""The program that runs plans on a GPU: it refuses without one, and its rehearsal runs to the end. What it compares on
one is compared on an emulated GPU by tests/tensorrt/test_engine.py, which uses the same functions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from swiftvideo.runtime.engines.cuda import Gpu, find_gpus
from swiftvideo.runtime.errors import EngineUnavailableError
from swiftvideo.runtime.manifest import GRAPHS, Manifest
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


RIGHT = SimpleNamespace(as_json=lambda: {"passed": True, "checks": [{"engine": "onnxruntime"}]})
"""A report of a graph that is right."""


@pytest.fixture
def program(small_bundle: Path, tmp_path: Path) -> Any:
    """Runs the rehearsal over the small bundle; gives exit code and figures."""

    def run() -> tuple[int, dict[str, Any]]:
        path = tmp_path / "plans.json"
        code = plans.main(["--rehearse", "--bundle", str(small_bundle), "--json", str(path)])
        return code, json.loads(path.read_text())

    return run


def test_the_rehearsal(program: Any) -> None:
    code, made = program()
    assert code == 0 and made["passed"] and not made["failed"]
    assert set(made["verify"]) == set(GRAPHS) and set(made["videos"]) == set(plans.POLICIES)
    entries = {f"verify/{name}" for name in GRAPHS} | {f"videos/{name}" for name in plans.POLICIES}
    assert set(made["seconds"]) == entries
    for graph, report in made["verify"].items():
        assert report["passed"] and {check["graph"] for check in report["checks"]} == {graph}
    video = made["videos"]["bridges"]
    assert video["modes"] == ["bridge-only"] and video["latents"] == 0 and len(video["milliseconds"]) == 8
    assert not video["warnings"]


def test_one_failure_loses_nothing_else(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, kept = plans.compare, {}

    def verify(folder: Path, graphs: list[str]) -> Any:
        if graphs == ["inject"]:
            raise RuntimeError("a plan that does not load")
        return RIGHT

    def compared(manifest: Any, ours: Any, theirs: Any, policy: Any) -> Any:
        if policy is plans.POLICIES["micro recaches"]:
            raise RuntimeError("misaligned address")
        kept.update(json.loads((tmp_path / "plans.json").read_text()))
        return compare(manifest, ours, theirs, policy)

    monkeypatch.setattr(plans, "verify_bundle", verify)
    monkeypatch.setattr(plans, "compare", compared)
    code, made = program()
    assert code == 1 and not made["passed"] and made["failed"] == ["verify/inject", "videos/micro recaches"]
    assert "a plan that does not load" in made["verify"]["inject"]["error"]
    assert "misaligned address" in made["videos"]["micro recaches"]["error"]
    assert made["verify"]["denoise"]["passed"] and made["videos"]["absolute positions"]["modes"]
    assert kept["videos"]["full recaches"]["modes"], "written before the last entry began"
    assert "passed" not in kept


def test_an_engine_that_does_not_open_fails_the_videos_alone(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "OnnxRuntimeEngine", lambda manifest: 1 / 0)
    monkeypatch.setattr(plans, "verify_bundle", lambda folder, graphs: RIGHT)
    code, made = program()
    assert code == 1 and made["failed"] == [f"videos/{name}" for name in plans.POLICIES]
    assert all(report["passed"] for report in made["verify"].values())


@pytest.mark.parametrize("options", [[], ["--no-plugins"]])
def test_plans_are_built_one_by_one(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """On a GPU without plans in the bundle; one that cannot be built does not keep the others."""
    bundles = []

    def build(folder: Path, wanted: str, graph: str, plugins: bool) -> dict[str, Any]:
        assert wanted == "rtx:sm89" and folder != small_bundle and Manifest.load(folder)
        assert plugins is not bool(options)
        if graph == "condition":
            raise RuntimeError("no tactic")
        return {"plan": f"trt/{graph}.plan"}

    monkeypatch.setattr(plans, "find_gpus", lambda: [Gpu(0, "A test", 89, "13.0", 8 << 30)])
    monkeypatch.setattr(plans, "target", lambda capability: f"rtx:sm{capability}")
    monkeypatch.setattr(plans, "runs", lambda manifest: False)
    monkeypatch.setattr(plans, "build", build)
    monkeypatch.setattr(plans, "measure", lambda folder, opening, record: bundles.append((folder, opening)))
    path = tmp_path / "plans.json"
    monkeypatch.setattr(Flavour, "installed", "1.7.1")
    assert plans.main(["--bundle", str(small_bundle), "--json", str(path), *options]) == 1
    made = json.loads(path.read_text())
    assert list(made["build"]) == list(GRAPHS) and made["failed"] == ["build/condition"]
    assert made["build"]["denoise"] == {"plan": "trt/denoise.plan"} and made["gpu"] == "A test"
    assert made["driver"] == "CUDA 13.0" and made["tensorrt_rtx"] == "1.7.1"
    assert [opening for _, opening in bundles] == [plans.TensorRTEngine]


def test_wrong_numbers_are_not_passed() -> None:
    good = {"latents": 1e-5, "levels": 1, "windows_differ": 0, "modes": ["bridge"]}
    compared = {"passed": True, "checks": [{"engine": "onnxruntime"}, {"engine": "tensorrt"}]}

    def passed(verify: dict[str, Any], **changed: Any) -> bool:
        videos = {"a": good, "b": good | changed}
        return plans.passed({"verify": {"x": compared, "y": verify}, "videos": videos}, "tensorrt")

    assert passed(compared)
    for wrong in ({"latents": float("nan")}, {"levels": 2}, {"windows_differ": 1}, {"modes": []}):
        assert not passed(compared, **wrong)
    assert not passed(compared | {"passed": False})
    assert not passed(compared | {"checks": [{"engine": "onnxruntime"}]})
