"""A small bundle whose heads have a width that the kernels take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from swiftvideo.export.bundle import DType, export_bundle
from swiftvideo.export.models.backbone import CausalWanModel
from tests.export.small import BACKBONE, checkpoint

HEAD = 24
LAYERS = 2


def export_small(folder: Path, dtype: DType = "fp32") -> Path:
    """Write the bundle of small random weights with heads of 24."""
    torch.manual_seed(2)
    config = dataclasses.replace(BACKBONE, dim=2 * HEAD, num_heads=2, num_layers=LAYERS)
    backbone = CausalWanModel(config).eval().requires_grad_(False)
    export_bundle(dataclasses.replace(checkpoint(), backbone=backbone), folder, dtype=dtype)
    return folder
