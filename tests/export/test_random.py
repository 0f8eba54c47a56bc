"""Random checkpoints have the published architecture, made small here so that it is quick."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from rich.console import Console
from tokenizers import Tokenizer

from swiftvideo.export import bundle, random
from swiftvideo.export.models.backbone import PRESETS
from swiftvideo.export.random import random_checkpoint
from swiftvideo.runtime.errors import SettingsError
from swiftvideo.sdk import inspect

from . import small

UMT5 = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_heads": 2, "vocab_size": 60, "num_layers": 5}


@pytest.fixture(autouse=True)
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", small.BACKBONE)
    monkeypatch.setattr(random, "UMT5_XXL", UMT5)
    monkeypatch.setattr(random, "AutoencoderKLWan", functools.partial(AutoencoderKLWan, **small.VAE))


def tensors(checkpoint: random.Checkpoint) -> dict[str, torch.Tensor]:
    parts = (checkpoint.backbone, checkpoint.text_encoder, checkpoint.vae)
    return {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.named_parameters()}


def test_weights_are_random_but_the_same() -> None:
    made, again, other = (tensors(random_checkpoint("small", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in made.items())
    assert any(not torch.equal(value, other[name]) for name, value in made.items())
    for name, value in made.items():
        assert not value.is_meta and not value.requires_grad and value.isfinite().all(), name
    weight = made["0.blocks.0.ffn.0.weight"]
    assert 0.8 < float(weight.std()) * small.BACKBONE.dim**0.5 < 1.2
    assert made["0.blocks.0.self_attn.norm_q.weight"].eq(1).all()
    assert made["0.blocks.0.ffn.0.bias"].eq(0).all()


def test_dtype() -> None:
    kinds = {value.dtype for value in tensors(random_checkpoint("small", dtype=torch.bfloat16)).values()}
    assert kinds == {torch.bfloat16}


def test_text_encoder_is_cut_unless_asked_for() -> None:
    cut, whole = random_checkpoint("small"), random_checkpoint("small", full_text_encoder=True)
    assert (cut.text_encoder.layers, whole.text_encoder.layers) == (2, 5)
    assert cut.sha256 != whole.sha256


def test_the_published_size() -> None:
    config = PRESETS["wan2.1-t2v-1.3b"]
    assert (config.dim, config.num_layers, config.head_dim, config.text_len) == (1536, 30, 128, 512)


def test_its_tokenizer() -> None:
    tokenizer = Tokenizer.from_str(random_checkpoint("small").tokenizer.decode())
    assert tokenizer.encode("w0 W2").ids == [3, 5, 1]


def test_unknown_architecture() -> None:
    with pytest.raises(SettingsError, match=r"'wan9'.*wan2\.1-t2v-1\.3b"):
        random_checkpoint("wan9")


@pytest.mark.parametrize(("full", "layers"), [(False, 2), (True, 5)])
def test_inspect_says_which_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, layers: int
) -> None:
    monkeypatch.setattr(bundle, "export_graph", lambda *_: None)
    checkpoint = random_checkpoint("small", full_text_encoder=full)
    bundle.export_bundle(checkpoint, tmp_path / "b", height=8, width=8)
    console = Console(record=True, width=120)
    inspect.show(tmp_path / "b", console)
    printed = console.export_text()
    assert f"{layers} layers of width 16, 60 tokens" in printed
    assert "random small, seed 0" in printed
