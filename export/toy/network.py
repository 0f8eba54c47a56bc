"""The backbone and the text encoder of the embedded model, as they are trained together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel

from . import prompts

CONFIG = BackboneConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=6,
    text_dim=64,
    text_len=prompts.TEXT_LEN,
    freq_dim=64,
)


class Network(nn.Module):
    """Backbone and text encoder; the state has the keys `wan.*` (original Wan names) and `text.*`."""

    def __init__(self, config: BackboneConfig = CONFIG) -> None:
        super().__init__()
        self.wan = CausalWanModel(config)
        nn.init.zeros_(self.wan.head.head.weight)  # the flow starts at zero
        nn.init.zeros_(self.wan.head.head.bias)
        self.text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(prompts.WORDS),
                d_model=config.text_dim,
                d_kv=16,
                num_heads=4,
                d_ff=128,
                num_layers=2,
                dropout_rate=0.0,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=16,
                feed_forward_proj="gated-gelu",
            )
        )

    def embeds(self, sentences: list[str]) -> Tensor:
        """Prompts -> [len(sentences), TEXT_LEN, text_dim], zero where padded."""
        pairs = [prompts.encode(sentence) for sentence in sentences]
        ids = torch.tensor([ids for ids, _ in pairs])
        mask = torch.tensor([mask for _, mask in pairs])
        hidden: Tensor = self.text(ids, attention_mask=mask).last_hidden_state
        return hidden * mask[..., None]
