"""The torch engine from a bundle alone: the same video as ONNX Runtime's, and clear refusals."""

from __future__ import annotations

import builtins
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from swiftvideo.export.restore import open_torch, torch_device
from swiftvideo.export.weights import WEIGHTS_KEY
from swiftvideo.runtime import load
from swiftvideo.runtime.errors import (
    BundleError,
    BundleIntegrityError,
    EngineUnavailableError,
    SettingsError,
)
from swiftvideo.runtime.manifest import Manifest, measure_files
from swiftvideo.sdk import engines
from swiftvideo.sdk.parts import MissingPartError

from . import small

PROMPTS = "w1 w2 w3", "w30 w4"


def test_the_video_is_that_of_the_other_engine(small_bundle: Path) -> None:
    """Six chunks with a switch: latents as close as float32 makes them, frames within a rounding."""
    made = []
    for pipeline in (load(small_bundle, "onnxruntime", 1), open_torch(small_bundle, "cpu")):
        with pipeline, pipeline.session(PROMPTS[0], seed=3) as session:
            chunks = []
            for index in range(6):
                if index == 3:
                    session.prompt(PROMPTS[1])
                chunks.append(next(session))
            made.append(chunks)
    for ours, theirs in zip(*made, strict=True):
        assert (ours.window, ours.mode) == (theirs.window, theirs.mode)
        np.testing.assert_allclose(ours.latents, theirs.latents, atol=2e-4)
        difference = ours.frames.astype(int) - theirs.frames
        assert np.abs(difference).max() <= 1


def test_weights_are_the_checkpoints(small_bundle: Path, said: list[str]) -> None:
    """Bit for bit, but for the time MLP, which graphs leave out; and no library has a word to say to it."""
    checkpoint = small.checkpoint()
    with open_torch(small_bundle, "cpu") as pipeline:
        engine: Any = pipeline.engine
        parts = (
            (engine.model, checkpoint.backbone),
            (engine.decoder, checkpoint.vae),
            (engine.text_encoder, checkpoint.text_encoder),
        )
        for ours, theirs in parts:
            state = theirs.state_dict()
            assert set(ours.state_dict()) == set(state)
            for name, value in ours.state_dict().items():
                if not name.startswith("time_"):
                    assert torch.equal(value, state[name]), name
        e, e0 = checkpoint.backbone.time_embed(torch.tensor(checkpoint.schedule.passes)[None])
        torch.testing.assert_close(engine.times, (e[0], e0[0]))
    assert said == []


def test_a_saved_session_goes_on(small_bundle: Path, tmp_path: Path) -> None:
    with open_torch(small_bundle, "cpu") as pipeline:
        with pipeline.session(PROMPTS[0], seed=5) as session:
            for _ in range(3):
                next(session)
            session.save(tmp_path / "saved.safetensors")
            expected = next(session)
        with pipeline.restore(tmp_path / "saved.safetensors") as session:
            np.testing.assert_array_equal(next(session).frames, expected.frames)


def test_changed_and_incomplete_bundles(small_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_bundle, copy)
    path = copy / "onnx" / "condition.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[[entry.key for entry in model.metadata_props].index(WEIGHTS_KEY)]
    onnx.save(model, path)
    with pytest.raises(BundleIntegrityError, match=r"condition\.onnx"):
        open_torch(copy, "cpu")
    manifest = Manifest.load(copy)
    dataclasses.replace(manifest, files=measure_files(copy)).save(copy)
    with pytest.raises(BundleError, match=r"condition does not record swift\.weights"):
        open_torch(copy, "cpu")
    files = {name: entry for name, entry in measure_files(copy).items() if name != "onnx/denoise.onnx"}
    dataclasses.replace(manifest, files=files).save(copy)
    with pytest.raises(BundleError, match=r"lists no onnx/denoise\.onnx"):
        open_torch(copy, "cpu")


def test_a_weight_that_is_not_recorded_is_missed(small_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_bundle, tmp_path / "copy"))
    path = copy / "onnx" / "decode.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(entry for entry in model.metadata_props if entry.key == WEIGHTS_KEY)
    recorded = json.loads(entry.value)
    name = next(name for name in recorded if name.endswith("conv_in.weight"))
    del recorded[name]
    entry.value = json.dumps(recorded)
    onnx.save(model, path)
    dataclasses.replace(Manifest.load(copy), files=measure_files(copy)).save(copy)
    with pytest.raises(
        BundleError, match=rf"does not record {name.removeprefix('decoder.')}: export it again"
    ):
        open_torch(copy, "cpu")


def test_devices() -> None:
    assert torch_device("cpu").type == "cpu"
    for name in ("meta", "gpu", "cuda:x"):
        with pytest.raises(SettingsError, match=f"device is '{name}'"):
            torch_device(name)
    with pytest.raises(EngineUnavailableError, match=r"cuda:99.*use 'cpu'"):
        torch_device("cuda:99")


def test_the_engines_name_chooses_it(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engines.open_pipeline(small_bundle, "torch:cpu", 1) as pipeline:
        assert pipeline.engine.name == "torch"
    with engines.open_pipeline(small_bundle, "onnxruntime", 1) as pipeline:
        assert pipeline.engine.name == "onnxruntime"
    with pytest.raises(SettingsError, match=r"'quantum': use 'auto', 'onnxruntime', 'tensorrt', 'torch'"):
        engines.open_pipeline(small_bundle, "quantum")
    importing = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "swiftvideo.export.restore":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(MissingPartError, match=r"'torch:cpu'.* needs torch.*swiftvideo\[export\]"):
        engines.open_pipeline(small_bundle, "torch:cpu")
