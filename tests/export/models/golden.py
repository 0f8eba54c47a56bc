"""Recorded numbers of the published code (tests/golden/data, or the folder in SWIFTVIDEO_GOLDEN)."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel

DATA = Path(os.environ.get("SWIFTVIDEO_GOLDEN") or Path(__file__).parents[2] / "golden" / "data")
TOLERANCE = 1e-4

CONFIG = BackboneConfig(dim=96, ffn_dim=192, num_heads=4, num_layers=3, text_dim=32, text_len=16, freq_dim=64)


@cache
def arrays(name: str) -> dict[str, Tensor]:
    """Tensors of `name`.npz that hold numbers."""
    with np.load(DATA / f"{name}.npz") as content:
        return {key: torch.from_numpy(content[key]) for key in content if content[key].dtype.kind in "fib"}


@cache
def backbone() -> CausalWanModel:
    """The small random model of weights.npz."""
    model = CausalWanModel(CONFIG)
    model.load_state_dict(arrays("weights"))
    return model.eval().requires_grad_(False)


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert equal shapes and an absolute difference of at most the tolerance."""
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected.double()).abs().max())
    assert difference <= tolerance, f"differs by {difference:.3g}, allowed is {tolerance:.3g}"
