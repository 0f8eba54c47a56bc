"""The text encoder: transformers' UMT5EncoderModel, as Wan uses it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Token ids to embeddings that are exact zeros where the mask is zero.

    encoder: a `transformers.UMT5EncoderModel`. Padding is masked inside, so it never changes a real token.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder.eval()

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
