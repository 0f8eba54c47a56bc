"""Engines over a recorded run's weights: the torch reference, and ONNX Runtime over graphs exported from it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime.engine import Engine
from swiftvideo.runtime.geometry import Geometry

from .scenario import Scenario

NAMES = ("torch", "onnxruntime")
TOLERANCE = 1e-4


@functools.cache
def model_of(weights: Path, sizes: tuple[tuple[str, Any], ...]) -> CausalWanModel:
    """The recorded model. sizes: `Scenario.model` as items, lists as tuples."""
    size = dict(sizes)
    model = CausalWanModel(
        BackboneConfig(
            dim=size["dim"],
            ffn_dim=size["ffn_dim"],
            num_heads=size["num_heads"],
            num_layers=size["num_layers"],
            text_dim=size["text_dim"],
            text_len=size["text_len"],
            in_channels=size["in_dim"],
            out_channels=size["out_dim"],
            patch=size["patch_size"],
            freq_dim=size["freq_dim"],
            eps=size["eps"],
        )
    )
    with np.load(weights) as file:
        model.load_state_dict({name: torch.tensor(file[name]) for name in file.files})
    return model.eval()


@functools.cache
def onnx_engine(model: CausalWanModel, geometry: Geometry, schedule: tuple[Any, ...]) -> Engine:
    """ONNX Runtime over graphs exported from `model`, with one thread."""
    from swiftvideo.export.bundle import export_backbone
    from swiftvideo.runtime.engines.onnxruntime import OnnxRuntimeEngine

    folder = tempfile.TemporaryDirectory(prefix="golden-")
    _KEPT.append(folder)
    manifest = export_backbone(model, geometry, Schedule(*schedule), Path(folder.name))
    return OnnxRuntimeEngine(manifest, threads=1)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def engine_of(scenario: Scenario, name: str, **geometry: int) -> Engine:
    """The engine `name` for a scenario; `geometry` replaces fields, for tests that go beyond the recordings."""
    import dataclasses

    sizes = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(scenario.model.items()))
    model = model_of(scenario.weights, sizes)
    shape = dataclasses.replace(scenario.geometry, **geometry)  # type: ignore[arg-type]
    schedule = (scenario.shift, scenario.denoising_steps, scenario.context_noise)
    if name == "torch":
        return TorchEngine(model, shape, Schedule(*schedule))
    return onnx_engine(model, shape, schedule)
