"""Plans by the command line, and what it says of machines without a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swiftvideo.runtime.engines import cuda
from swiftvideo.runtime.errors import EngineUnavailableError, SwiftVideoError
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.plugins import flavours
from swiftvideo.runtime.plugins.flavours import FLAVOURS, RTX, TENSORRT, Flavour, install_one
from swiftvideo.runtime.plugins.plans import plans_of
from swiftvideo.sdk import gpus
from swiftvideo.sdk.cli import app, main

from .driver import FakeDriver


def test_target_alone_adds_plans_to_a_bundle(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftvideo.export import tensorrt as builder

    monkeypatch.setattr(builder, "GRAPHS", ("inject",))
    arguments = [
        "export",
        "--out",
        str(small),
        "--target",
        "rtx:sm86",
        "--target",
        "rtx:sm89",
        "--no-plugins",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [["rtx:sm86", "inject"], ["rtx:sm89", "inject"]]
    assert all(line.count("MiB") == 2 for line in lines)
    plans = plans_of(Manifest.load(small))
    assert {(plan.target, plan.functions) for plan in plans} == {("rtx:sm86", True), ("rtx:sm89", True)}
    shown = CliRunner().invoke(app, ["inspect", str(small)])
    assert "none: built with --no-plugins" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--target", "rtx:sm90"], 2, "target is 'rtx:sm90': use h100, h200, rtx:sm80"),
        (["--target", "rtx:sm89"], 1, "no bundle at"),
        (["--random", "wan2.1-t2v-1.3b", "--target", "b200"], 2, "target is 'b200'"),
        ([], 2, "give either CHECKPOINT or --random"),
    ],
)
def test_wrong_targets_are_said_before_any_work(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["swiftvideo", "export", "--out", str(tmp_path / "none"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def machine(monkeypatch: pytest.MonkeyPatch, system: str, processor: str) -> None:
    """This is another kind of machine."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "system", lambda: {"linux": "Linux", "darwin": "Darwin"}[system])
    monkeypatch.setattr(platform, "machine", lambda: processor)


def notes(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, installed: Flavour | None
) -> dict[str, tuple[bool, str]]:
    monkeypatch.setattr(cuda, "cuda_driver", lambda: driver)
    monkeypatch.setattr(Flavour, "installed", property(lambda self: "1.7.1" if self is installed else None))
    monkeypatch.setattr(Flavour, "load", lambda self: None)
    machine(monkeypatch, "linux", "x86_64")
    return {item.what: (item.usable, item.note) for item in gpus.gpu_findings()}


def test_doctor_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.missing = True
    found = notes(monkeypatch, driver, RTX)
    assert found["CUDA"][0] is found["engine tensorrt"][0] is False
    assert "no NVIDIA driver" in found["engine tensorrt"][1]
    assert found["tensorrt_rtx"] == (True, "1.7.1; plans for sm80, sm86, sm89, sm120")
    assert found["tensorrt"] == (False, "not installed: pip install 'swiftvideo[tensorrt]'")


def test_doctor_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    found = notes(monkeypatch, driver, RTX)
    assert found["CUDA"] == (True, "13.0, 1 GPUs for this process")
    assert found["engine tensorrt"] == (
        True,
        "for bundles with plans: swiftvideo export --out BUNDLE --target rtx:sm89",
    )
    driver.capability = (9, 0)
    usable, note = notes(monkeypatch, driver, RTX)["engine tensorrt"]
    assert not usable and "no plans can be built for sm90: pip install 'swiftvideo[tensorrt]'" in note
    usable, note = notes(monkeypatch, driver, None)["engine tensorrt"]
    assert not usable and "no TensorRT is installed" in note


def test_no_command_is_named_that_installs_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "pip install 'swiftvideo[tensorrt]'"
    machine(monkeypatch, "linux", "x86_64")
    assert install_one(FLAVOURS.values()) == f"{TENSORRT.install} or {RTX.install}"
    assert TENSORRT.install == command and RTX.install == "pip install 'swiftvideo[tensorrt-rtx]'"
    machine(monkeypatch, "linux", "aarch64")
    assert install_one(FLAVOURS.values()) == command
    assert install_one([RTX]) == RTX.install == "there are no packages for Linux on aarch64"
    machine(monkeypatch, "darwin", "arm64")
    assert install_one(FLAVOURS.values()) == "there are no packages for Darwin on arm64"
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not [item for item in gpus.gpu_findings()[1:] if item.usable or "pip" in item.note]


def test_doctor_with_what_keeps_the_engine_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.version = 12080
    usable, note = notes(monkeypatch, driver, RTX)["engine tensorrt"]
    assert not usable and "CUDA 12.8 and TensorRT needs 13.0: install driver 580 or newer" in note
    driver.version = 13000

    def broken(self: Flavour) -> None:
        raise EngineUnavailableError(f"{self.name} cannot be imported")

    notes(monkeypatch, driver, RTX)
    monkeypatch.setattr(Flavour, "load", broken)
    found = {item.what: (item.usable, item.note) for item in gpus.gpu_findings()}
    assert found["engine tensorrt"] == found["tensorrt_rtx"] == (False, "tensorrt_rtx cannot be imported")


def test_a_module_that_is_not_there_is_said() -> None:
    absent = Flavour("absent", "swiftvideo.no_such_module", ("swiftvideo",), "pip install it", "", (89,))
    assert absent.installed is None
    with pytest.raises(SwiftVideoError, match=r"absent cannot be imported .*: pip install it"):
        absent.load()


def test_a_module_without_its_libraries_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's, whose libraries come from another index: the command that was run already is no help."""
    (tmp_path / "half_installed.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    half = Flavour(
        "half", "half_installed", ("swiftvideo",), "pip install it", "its libraries are there", (89,)
    )
    with pytest.raises(SwiftVideoError) as caught:
        half.load()
    said = str(caught.value)
    assert said.startswith("half cannot be imported (libnvinfer.so.11: cannot open shared object file): ")
    assert said.endswith(f"{half.installed} is installed; its libraries are there") and "pip" not in said


def test_every_way_to_install_tensorrt_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta package brings `tensorrt_cu13`, which may also come alone; in a container `tensorrt` is all there is."""
    there: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(flavours.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(flavours.importlib.metadata, "version", version)
    assert TENSORRT.installed is None
    for packages in (
        {"tensorrt": "11.1.0.106"},
        {"tensorrt_cu13": "11.1.0.106"},
        {"tensorrt": "11.0.0.114", "tensorrt_cu13": "11.1.0.106"},
        {"tensorrt_cu12": "11.1.0.106"},
    ):
        there.clear()
        there.update(packages)
        assert TENSORRT.installed == "11.1.0.106"
