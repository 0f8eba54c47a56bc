"""The text encoder: transformers' UMT5EncoderModel, as Wan uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import UMT5Config

from .backbone import MOST_LAYERS

SETTINGS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
)
"""Of a UMT5 encoder's config.json: all that its numbers depend on."""


def umt5_config(settings: Mapping[str, Any]) -> UMT5Config:
    """The configuration of an encoder, from what a file says of it.

    Other settings are left out: transformers would fetch code that some of them name, such as `attn_implementation`,
    and run it. Raises ValueError.
    """
    config = UMT5Config(**{name: settings[name] for name in SETTINGS if name in settings})
    if config.num_layers > MOST_LAYERS:
        raise ValueError(f"num_layers is {config.num_layers}, at most {MOST_LAYERS} are supported")
    return config


class TextEncoder(nn.Module):
    """Token ids to embeddings that are exact zeros where the mask is zero.

    encoder: a `transformers.UMT5EncoderModel`. Padding is masked inside, so it never changes a real token.

    In float16 the modules that transformers keeps in float32 stay so, and with them the residual stream: with trained
    weights it does not fit into float16.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder.eval()
        if encoder.dtype == torch.float16:
            self.half()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextEncoder:
        wide = set(self.encoder._keep_in_fp32_modules or ())
        kept = {
            id(value)
            for name, value in self.encoder.named_parameters()
            if not wide.isdisjoint(name.split("."))
        }

        def convert(value: Tensor) -> Tensor:
            made = fn(value)
            if id(value) not in kept or made.dtype != torch.float16:
                return made
            return value.to(made.device, torch.float32)

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return int(self.encoder.config.d_model)

    @property
    def layers(self) -> int:
        """Number of the encoder's blocks."""
        return int(self.encoder.config.num_layers)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.encoder.config.vocab_size)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B,T], mask int64 [B,T] (1 = token, 0 = padding) -> embeds [B,T,text_dim]."""
        embeds: Tensor = self.encoder(input_ids=ids, attention_mask=mask, return_dict=False)[0]
        return embeds * mask.unsqueeze(-1).to(embeds.dtype)
