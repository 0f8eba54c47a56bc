"""A whole checkpoint in memory that is exported in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from swiftvideo.export.bundle import export_bundle
from swiftvideo.export.checkpoint import Checkpoint
from swiftvideo.export.model_info import ModelInfo
from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel
from swiftvideo.export.models.text import TextEncoder
from swiftvideo.export.models.vae import StreamingDecoder
from swiftvideo.export.random import word_tokenizer

BACKBONE = BackboneConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=16, text_len=6, freq_dim=16)
TEXT = UMT5Config(
    vocab_size=50,
    d_model=BACKBONE.text_dim,
    d_kv=8,
    num_heads=2,
    d_ff=20,
    num_layers=1,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=8,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)
VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True],
}
HEIGHT, WIDTH = 8, 12


def checkpoint() -> Checkpoint:
    """Random weights, the same each time, of sizes that occur nowhere else; biases and norms are random too."""
    torch.manual_seed(1)
    parts = CausalWanModel(BACKBONE), UMT5EncoderModel(TEXT), AutoencoderKLWan(**VAE)
    for part in parts:
        for weight in part.parameters():
            if weight.ndim == 1:
                weight.data.add_(torch.randn_like(weight) * 0.1)
        part.eval().requires_grad_(False)
    backbone, text, vae = parts
    mean, std = torch.linspace(-0.5, 0.5, 16).tolist(), torch.linspace(0.5, 2, 16).tolist()
    return Checkpoint(
        kind="small",
        backbone=backbone,
        text_encoder=TextEncoder(text),
        vae=StreamingDecoder(vae, mean, std),
        tokenizer=word_tokenizer(40),
        info=ModelInfo(name="small", height=HEIGHT, width=WIDTH, fps=5, text_len=6, sink=2, shift=3.0),
        sha256="ab" * 32,
    )


def export_small(folder: Path, height: int | None = None, width: int | None = None) -> Path:
    """Its bundle: real graphs on the real CPU engine, a chunk in milliseconds."""
    small = checkpoint()
    info = dataclasses.replace(
        small.info, height=height or small.info.height, width=width or small.info.width
    )
    export_bundle(dataclasses.replace(small, info=info), folder)
    return folder
