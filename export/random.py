"""Checkpoints with random weights, for sizing and benchmarks where the real ones are not at hand.

The architecture is the published one. Only the text encoder is cut, to two layers of full width, unless the whole
UMT5-XXL (11 GB in bfloat16) is asked for; `swiftvideo inspect` shows which a bundle has.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from swiftvideo.runtime.errors import SettingsError

from .checkpoint import Checkpoint, Outline
from .model_info import ModelInfo
from .models.backbone import PRESETS, CausalWanModel
from .models.text import TextEncoder
from .models.vae import StreamingDecoder

M = TypeVar("M", bound=nn.Module)

UMT5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "vocab_size": 256384,
    "num_layers": 24,
}
SHORT_LAYERS = 2
WORDS = 4096
"""Words "w0", "w1", ... that the generated tokenizer knows."""


def random_outline(name: str) -> Outline:
    """What `random_checkpoint` makes, before any weights are there. Raises SettingsError for an unknown name."""
    if name not in PRESETS:
        raise SettingsError(f"no architecture {name!r}: known are {', '.join(PRESETS)}")
    config = PRESETS[name]
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    decoder = StreamingDecoder(vae)
    info = ModelInfo(name=f"{name}-random", text_len=config.text_len)
    return Outline(info, config, decoder.temporal_stride, decoder.spatial_stride)


def random_checkpoint(
    name: str, *, dtype: torch.dtype = torch.float32, full_text_encoder: bool = False, seed: int = 0
) -> Checkpoint:
    """A checkpoint of a preset's architecture, its weights on the CPU; see `random_video_models`."""
    generator = torch.Generator().manual_seed(seed)
    backbone, vae = random_video_models(name, dtype, generator)
    layers = UMT5_XXL["num_layers"] if full_text_encoder else SHORT_LAYERS
    text = UMT5Config(**UMT5_XXL | {"num_layers": layers}, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(text)
    return Checkpoint(
        kind=f"random {name}, seed {seed}",
        backbone=backbone,
        text_encoder=TextEncoder(_fill(encoder, dtype, generator)),
        vae=vae,
        tokenizer=word_tokenizer(WORDS),
        info=random_outline(name).info,
        sha256=hashlib.sha256(f"{name} {seed} {full_text_encoder}".encode()).hexdigest(),
    )


def random_video_models(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[CausalWanModel, StreamingDecoder]:
    """Backbone and VAE of a preset's architecture. Weights are made on the generator's device and in `dtype` directly.

    Raises SettingsError for an unknown name.
    """
    config = random_outline(name).config
    with torch.device("meta"):
        backbone, vae = CausalWanModel(config), AutoencoderKLWan()
    backbone, vae = _fill(backbone, dtype, generator), _fill(vae, dtype, generator)
    return backbone, StreamingDecoder(vae).to(generator.device)


def _fill(module: M, dtype: torch.dtype, generator: torch.Generator) -> M:
    """Real tensors in the place of meta ones: N(0, 1/fan_in) for matrices and convolutions, ones for norms' weights."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter that two modules share is made once
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter in made:
                setattr(owner, name, made[parameter])
                continue
            value = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
            if name == "modulation":
                value.normal_(std=value.shape[-1] ** -0.5, generator=generator)
            elif value.ndim >= 2 and name != "gamma":
                value.normal_(std=value[0].numel() ** -0.5, generator=generator)
            else:
                value.fill_(0.0 if name == "bias" else 1.0)
            made[parameter] = nn.Parameter(value, requires_grad=False)
            setattr(owner, name, made[parameter])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:
                raise SettingsError(
                    f"buffer {name} of {type(owner).__name__} has no rule: add one to random.py"
                )
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    return module.eval()


def word_tokenizer(words: int) -> bytes:
    """Content of a tokenizer.json that knows the words w0, w1, ...: no file has to be fetched."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    content: str = tokenizer.to_str(pretty=False)
    return content.encode()
