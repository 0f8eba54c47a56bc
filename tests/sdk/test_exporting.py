"""`swiftvideo export`: what it refuses before any weights are read, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install 'swiftvideo[export]'")

from swiftvideo.export import checkpoint as loading, random as random_weights
from swiftvideo.runtime.errors import CheckpointError, EngineUnavailableError, SettingsError, UsageError
from swiftvideo.runtime.plugins.flavours import Flavour
from swiftvideo.sdk import exporting
from tests.bench.naive import untrained_checkpoint
from tests.interrupting import interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_checkpoint(tmp_path_factory.mktemp("untrained") / "checkpoint")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are read or made."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "read_weights", fail)
    monkeypatch.setattr(loading, "load_checkpoint", fail)
    monkeypatch.setattr(random_weights, "random_checkpoint", fail)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 64, "dtype": "bf16"}, "--height, --dtype without CHECKPOINT"),
        (
            {"backbone": Path("x"), "lora": Path("y"), "lora_alpha": 2.0},
            "--backbone, --lora, --lora-alpha without",
        ),
        (
            {"overwrite": True, "full_text_encoder": True},
            "--full-text-encoder, --overwrite without CHECKPOINT",
        ),
    ],
)
def test_plans_alone_take_no_options_of_an_export(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        exporting.export(None, tmp_path, targets=["rtx:sm89"], **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"random": "wan2.1-t2v-1.3b", "lora_alpha": 2.0}, "--lora-alpha with --random"),
        ({"lora_alpha": 2.0}, "--lora-alpha without --lora"),
        ({"plugins": False}, "--no-plugins without --target"),
        ({"dtype": "int8"}, "--dtype is 'int8'"),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    source = None if "random" in options else folder
    with pytest.raises(UsageError, match=match):
        exporting.export(source, tmp_path / "b", **options)


def test_what_needs_no_weights_is_checked_before_them(
    unread: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b"
    with pytest.raises(SettingsError, match=r"height is 100 pixels: a positive multiple of 16"):
        exporting.export(None, out, random="wan2.1-t2v-1.3b", height=100)
    with pytest.raises(SettingsError, match="width is 0 pixels"):
        exporting.export(folder, out, width=0)
    with pytest.raises(SettingsError, match="exists and is not empty"):
        exporting.export(folder, folder)
    odd = Path(shutil.copytree(folder, tmp_path / "odd"))
    config = odd / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dim": 144, "num_heads": 12}))
    with pytest.raises(SettingsError, match="head width is 12"):
        monkeypatch.setattr(Flavour, "installed", "1.7.1")
        exporting.export(odd, out, targets=["rtx:sm89"])
    with pytest.raises(EngineUnavailableError, match="--target rtx:sm89 needs tensorrt_rtx"):
        monkeypatch.setattr(Flavour, "installed", None)
        exporting.export(folder, out, targets=["rtx:sm89"])
    with pytest.raises(CheckpointError, match="not a folder"):
        exporting.export(tmp_path / "absent", out)
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    program = "import time, swiftvideo.export.bundle as b; b.export_graph = lambda *_: time.sleep(600); "
    program += "from swiftvideo.sdk.cli import main; main()"
    place = tmp_path / "bundles"
    command = [sys.executable, "-c", program, "export", str(folder), "--out", str(place / "b")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _, err = interrupted(child, number, lambda: place.is_dir() and any(place.glob(".b-*/onnx")), within=300)
    assert child.returncode == 128 + number and "Traceback" not in err
    assert "interrupted: what was not finished is removed" in err
    assert not place.exists()
