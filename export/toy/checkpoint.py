"""Writes the trained parts as a diffusers-like folder that the exporter reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .prompts import TEXT_LEN, save_tokenizer

FPS = 12


def save_checkpoint(
    folder: Path,
    *,
    backbone: Mapping[str, Tensor],
    config: Mapping[str, Any],
    vae: nn.Module,
    text_encoder: nn.Module,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Write transformer/, vae/, text_encoder/, tokenizer.json and model.json into `folder`.

    `backbone` has the original Wan names; `config` the fields of BackboneConfig; `mean` and `std` are
    float32 [16].
    """
    transformer = folder / "transformer"
    transformer.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().contiguous().clone() for name, value in backbone.items()}
    save_file(tensors, transformer / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    wan = {
        "_class_name": "WanModel",
        "dim": config["dim"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "num_heads": config["num_heads"],
        "num_layers": config["num_layers"],
        "text_dim": config["text_dim"],
        "text_len": config["text_len"],
        "patch_size": list(config["patch"]),
        "eps": config["eps"],
    }
    _write_json(transformer / "config.json", wan)
    means, stds = [float(value) for value in mean], [float(value) for value in std]
    vae.register_to_config(latents_mean=means, latents_std=stds)  # type: ignore[operator]
    vae.save_pretrained(folder / "vae")  # type: ignore[operator]
    text_encoder.save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    save_tokenizer(folder / "tokenizer.json")
    model = {
        "name": "toy",
        "height": 64,
        "width": 64,
        "fps": FPS,
        "text_len": TEXT_LEN,
        "window": 12,
        "sink": 3,
        "chunk": 3,
        "max_anchors": 4,
        "shift": 5.0,
        "steps": [1000, 750, 500, 250],
        "latents_mean": means,
        "latents_std": stds,
        "policy": {"policy": "swift", "positions": "windowed"},
    }
    _write_json(folder / "model.json", model)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
