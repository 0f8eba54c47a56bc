"""A small backbone's weights, config and diffusers twin."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel

State = dict[str, Tensor]

CONFIG = BackboneConfig(
    dim=36,
    ffn_dim=40,
    num_heads=3,
    num_layers=2,
    text_dim=24,
    text_len=8,
    in_channels=4,
    out_channels=4,
    freq_dim=16,
)
WAN_JSON = {
    "_class_name": "WanModel",
    "dim": 36,
    "ffn_dim": 40,
    "num_heads": 3,
    "num_layers": 2,
    "text_dim": 24,
    "text_len": 8,
    "in_dim": 4,
    "out_dim": 4,
    "freq_dim": 16,
}


def random_state() -> State:
    """Random weights under original Wan names."""
    torch.manual_seed(0)
    return {key: torch.randn_like(value) for key, value in CausalWanModel(CONFIG).state_dict().items()}


def diffusers_model() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
    )


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def same(model: CausalWanModel, expected: State) -> None:
    """A loaded model has these weights, to be run and not trained."""
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
