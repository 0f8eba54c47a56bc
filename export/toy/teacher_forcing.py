"""The training forward: clean and noisy frames of one stretch of video in one pass under a block mask.

At inference a chunk is denoised over a cache that earlier context passes filled. Here those context passes
(clean rows, t = 0) and the denoising passes (noisy rows) of several chunks share one forward over the same
layers: a row sees exactly the rows whose keys the cache would offer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from swiftvideo.export.models.backbone import CausalWanModel, time_tables

CHUNK = 3
"""Latent frames of a chunk, and of the sink."""
WINDOW = 12
MEMORY = 4
"""Memory tokens (two of a bridge, two anchors) that training imitates."""
Memory = Callable[[Tensor], Tensor]
"""V of a layer [B,K,n,d] -> memory tokens [B,MEMORY,n,d], used as keys and as values."""


def block_mask(
    clean: int, noisy: Sequence[int], visible: int, tokens: int, *, memory: bool, rows: int = MEMORY
) -> Tensor:
    """Which keys a row sees: bool [Q, rows + Q], Q = (clean + len(noisy)) * tokens.

    `clean` chunks are followed by one noisy copy of each chunk in `noisy`. A row sees the first chunk (the
    sink), its own chunk, the last `visible` tokens of the clean chunks before it and, from the third chunk
    on and with `memory`, the memory tokens in front. `tokens`: tokens of a chunk.
    """
    count = (clean + len(noisy)) * tokens
    mask = torch.zeros(count, rows + count, dtype=torch.bool)
    for place, chunk in enumerate([*range(clean), *noisy]):
        row = slice(place * tokens, (place + 1) * tokens)
        mask[row, rows + place * tokens : rows + (place + 1) * tokens] = True
        if chunk > 0:
            mask[row, rows : rows + tokens] = True
        if chunk > 1:
            first = max(tokens, chunk * tokens - visible)
            mask[row, rows + first : rows + chunk * tokens] = True
            mask[row, :rows] = memory
    return mask


def memory_tokens(tokens: int, batch: int, generator: torch.Generator) -> Memory:
    """Tokens like those of a bridge and of anchors: means of V, of this video and of another of the batch.

    The scale is drawn from 0.3 to 1, as a decaying bridge has it.
    """
    other = torch.randperm(batch, generator=generator)
    scale = torch.rand(batch, 1, 1, 1, generator=generator) * 0.7 + 0.3
    share = torch.rand(batch, 1, 1, 1, generator=generator)

    def make(v: Tensor) -> Tensor:
        sink = v[:, :tokens].mean(1, keepdim=True)
        recent = v[:, tokens : 3 * tokens].mean(1, keepdim=True)
        mixed = share * recent + (1 - share) * sink[other]
        return torch.cat([sink, recent, mixed, recent[other]], 1) * scale

    return make


def forward(
    model: CausalWanModel,
    latents: Tensor,
    t: Tensor,
    frames: Tensor,
    embeds: Tensor,
    mask: Tensor,
    memory: Memory | None = None,
) -> Tensor:
    """Flow of every frame, [B,F,C,h,w].

    latents [B,F,C,h,w]: clean, then noisy frames; t [B,F] in 0..1000; frames [F]: positions of the rotary
    embedding; embeds [B,F/3,T,text_dim]: the prompt of each chunk; mask bool [B,Q,M+Q], Q = F*P, from
    `block_mask` (M = 0 without `memory`).
    """
    batch, chunks = embeds.shape[:2]
    cos, sin = time_tables(frames[None], model.config.time_pairs)
    cross_k, cross_v = model.cross_kv(model.embed_text(embeds.flatten(0, 1)))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if memory is not None:
            extra = memory(v)
            k, v = torch.cat([extra, k], 1), torch.cat([extra, v], 1)
        return _attention(q, k, v, mask[:, None])

    def cross_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = q.unflatten(1, (chunks, -1)).flatten(0, 1)  # a chunk's rows meet their own prompt
        o: Tensor = _attention(each, k, v, None).unflatten(0, (batch, chunks)).flatten(1, 2)
        return o

    e, e0 = model.time_embed(t)
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    flow, _, _ = model(latents, e, e0, cos, sin, cross_k, cross_v, attend, cross_attend)
    result: Tensor = flow
    return result


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    o: Tensor = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return o.transpose(1, 2)
