"""`swiftvideo verify`: a good bundle passes, anything else is found."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import torch

from swiftvideo.export import verify
from swiftvideo.export.bundle import export_bundle
from swiftvideo.export.restore import open_torch
from swiftvideo.export.verify import verify_bundle
from swiftvideo.export.weights import CONFIG_KEY, WEIGHTS_KEY
from swiftvideo.runtime.errors import (
    BundleError,
    BundleIntegrityError,
    EngineUnavailableError,
    SettingsError,
    UsageError,
)
from swiftvideo.runtime.manifest import GRAPHS, Manifest, measure_files
from swiftvideo.sdk import exporting

from . import small


@pytest.fixture
def copy(small_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_bundle, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, graph: str, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Edit a graph and list its new hash."""
    path = folder / "onnx" / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    onnx.save(model, path)
    accept(folder)


def accept(folder: Path) -> None:
    """Make the manifest list the files as they are."""
    dataclasses.replace(Manifest.load(folder), files=measure_files(folder)).save(folder)


def flip(folder: Path, name: str) -> None:
    """Change one weight in the middle of a data file."""
    path = folder / "onnx" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 8 * 4
    content[middle : middle + 4] = torch.tensor([3.0]).numpy().tobytes()
    path.write_bytes(content)


def test_a_good_bundle(small_bundle: Path) -> None:
    seen: list[str] = []
    report = verify_bundle(small_bundle, threads=1, progress=lambda graph, *_: seen.append(graph))
    assert seen == [*GRAPHS, "done"]
    assert {check.graph for check in report.checks} == set(GRAPHS)
    assert {check.engine for check in report.checks} == {"onnxruntime"}
    assert report.failures == []
    assert max(check.error for check in report.checks if check.output != "frames") < 1e-4
    assert all(check.tolerance == (1 if check.output == "frames" else 1e-3) for check in report.checks)
    steps = {check.case.split(",")[0] for check in report.checks if check.graph == "denoise"}
    assert {"step 0", "step 1", "step 2", "step 3", "context pass", "recache of 12 frames"} <= steps
    assert json.loads(json.dumps(report.as_json()))["passed"] is True


def test_a_float16_text_encoder_is_compared_with_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its feed-forward parts give more than float16 holds; a reference in float16 would overflow as a graph does."""
    source = small.checkpoint()
    for name, weight in source.text_encoder.named_parameters():
        if name.endswith("wo.weight"):
            weight.mul_(1e6)
    export_bundle(source, tmp_path / "b", dtype="fp16")
    report = verify_bundle(tmp_path / "b", graphs=["text_encoder"], threads=1)
    assert report.failures == [] and {check.engine for check in report.checks} == {"onnxruntime"}
    run = verify.OnnxRuntimeRunner.run
    monkeypatch.setattr(
        verify.OnnxRuntimeRunner, "run", lambda *args: [value * torch.inf for value in run(*args)]
    )
    assert verify_bundle(tmp_path / "b", graphs=["text_encoder"], threads=1).failures


def test_against_the_checkpoint(small_bundle: Path) -> None:
    report = verify_bundle(small_bundle, small.checkpoint(), threads=1)
    assert report.failures == []
    assert report.weights == "small"


@pytest.mark.parametrize(
    ("file", "graphs"),
    [("denoise.data", {"denoise"}), ("condition.data", {"condition"}), ("decoder.data", {"decode"})],
)
def test_a_changed_weight_is_detected(copy: Path, file: str, graphs: set[str]) -> None:
    flip(copy, file)
    with pytest.raises(BundleIntegrityError, match=file):
        verify_bundle(copy, graphs=[*graphs], threads=1)
    accept(copy)  # whoever changed it also changed the manifest: only the checkpoint tells
    report = verify_bundle(copy, small.checkpoint(), graphs=[*graphs, "inject"], threads=1)
    assert {check.graph for check in report.failures} == graphs


def test_a_changed_graph_is_detected_without_the_checkpoint(copy: Path) -> None:
    def weaken(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "DynamicWindowAttention")
        next(a for a in node.attribute if a.name == "scale").f *= 0.5

    change(copy, "denoise", weaken)
    report = verify_bundle(copy, graphs=["denoise", "condition"], threads=1)
    assert {check.graph for check in report.failures} == {"denoise"}
    assert report.as_json()["passed"] is False


def test_weights_that_are_not_recorded(copy: Path) -> None:
    def forget(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == WEIGHTS_KEY)
        recorded = json.loads(entry.value)
        del recorded["model.blocks.1.ffn.0.weight"]
        entry.value = json.dumps(recorded)

    change(copy, "denoise", forget)
    with pytest.raises(BundleError, match=r"denoise, .* is not finite.*--checkpoint"):
        verify_bundle(copy, graphs=["denoise"], threads=1)
    assert verify_bundle(copy, small.checkpoint(), graphs=["denoise"], threads=1).failures == []
    change(copy, "denoise", lambda model: model.ClearField("metadata_props"))
    with pytest.raises(BundleError, match=r"does not record swift\.config"):
        verify_bundle(copy, graphs=["denoise"], threads=1)


@pytest.mark.parametrize(
    ("graph", "value"),
    [
        ("denoise", "["),
        ("denoise", "{}"),
        ("denoise", '{"backbone": {"patch": 3}}'),
        ("denoise", '{"backbone": {"patch": [1, 2, 2], "evil": 1}}'),
        ("text_encoder", '{"text_encoder": {"num_layers": 1000000000}}'),
        ("text_encoder", '{"text_encoder": []}'),
        ("decode", '{"vae": {"base_dim": "x"}}'),
    ],
)
def test_records_of_which_no_model_can_be_made(copy: Path, graph: str, value: str) -> None:
    def tell(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == CONFIG_KEY).value = value

    change(copy, graph, tell)
    for work in (lambda: verify_bundle(copy, graphs=[graph], threads=1), lambda: open_torch(copy, "cpu")):
        with pytest.raises(BundleError, match=r"(cannot be built|is not there|does not fit).*: export"):
            work()


def test_a_graph_that_is_none(copy: Path) -> None:
    (copy / "onnx/denoise.onnx").write_bytes(b"\xff" * 100)
    accept(copy)
    with pytest.raises(BundleError, match=r"cannot be built \(DecodeError"):
        open_torch(copy, "cpu")


def test_a_bundle_that_no_engine_can_run(copy: Path) -> None:
    dataclasses.replace(Manifest.load(copy), dtype="bf16").save(copy)
    with pytest.raises(EngineUnavailableError, match=r"nothing was compared.*bf16"):
        verify_bundle(copy)


def test_an_engine_that_is_not_there_is_named(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(manifest: Manifest, graphs: Sequence[str], threads: int | None) -> verify.Runner:
        raise EngineUnavailableError("no such device")

    monkeypatch.setitem(verify.ENGINES, "abacus", missing)
    report = verify_bundle(small_bundle, graphs=["inject"], threads=1)
    assert set(report.unavailable) == {"abacus", "tensorrt"}
    assert report.unavailable["abacus"] == "no such device"
    assert report.unavailable["tensorrt"]
    assert {check.engine for check in report.checks} == {"onnxruntime"}


def test_a_graph_that_is_not_there(small_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="no graph encode in this bundle: it has text_encoder"):
        verify_bundle(small_bundle, graphs=["denoise", "encode"])


def test_another_checkpoint(small_bundle: Path) -> None:
    other = small.checkpoint()
    other = dataclasses.replace(other, info=dataclasses.replace(other.info, window=9))
    with pytest.raises(SettingsError, match="window 9 instead of 12"):
        verify_bundle(small_bundle, other)


def test_the_command(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "GRAPHS", ("inject",))
    exporting.verify(copy, threads=1)
    table = capsys.readouterr().out
    assert "inject" in table and "onnxruntime" in table and "ok" in table
    with pytest.raises(UsageError, match="--checkpoint"):
        exporting.verify(copy, lora=copy)

    def other(model: onnx.ModelProto) -> None:
        function = model.functions[0]
        node = next(node for node in function.node if "one_f" in node.output)
        next(a for a in node.attribute if a.name == "value_float").f = 1.5

    change(copy, "inject", other)
    with pytest.raises(exporting.MismatchError, match=r"of inject \(.*\) on onnxruntime"):
        exporting.verify(copy, graphs=["inject"], threads=1, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    assert {check["output"] for check in printed["checks"]} == {"bridge", "anchor"}
