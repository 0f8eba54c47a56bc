"""Torch reference of the two custom ops (algorithm.md, sections 3, 5 and 6).

Written to be read and compared with: the ONNX local functions (onnx_ops.py) and the kernels compute the same.
Symbols: B batch, N queries (F*P fresh tokens), R cache rows, L layers, n heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from swiftvideo.runtime.errors import UsageError

NORM_FLOOR = 1e-6
"""Floor of norms in cosines, and of the squared motion below which nothing is projected out."""


def dynamic_window_attention(
    q: Tensor,
    fresh_k: Tensor,
    fresh_v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    segments: Tensor,
    layer: int,
    scale: float,
) -> Tensor:
    """Attention of q over the rows that `segments` lists, softmax in float32.

    q, fresh_k, fresh_v [B,N,n,d]; cache_k, cache_v [L,B,R,n,d]; segments int [B,6,2] of (start, length) in the row
    space [cache 0..R | fresh R..R+N]; those of length 0 are unused, and no row may be listed twice. Returns [B,N,n,d]
    in q's dtype.
    Raises UsageError for a table that lists no row at all. The exported graphs cannot raise: there the mean of all
    rows' values comes out, which means nothing.
    """
    outputs = []
    for item, table in enumerate(segments.tolist()):
        if not any(length for _, length in table):
            raise UsageError(
                f"the segments of item {item} list no row: attention needs at least one key, such as the fresh rows"
            )
        k = torch.cat((cache_k[layer, item], fresh_k[item]))
        v = torch.cat((cache_v[layer, item], fresh_v[item]))
        rows = torch.cat([torch.arange(start, start + length) for start, length in table]).to(q.device)
        keys, values = (x[rows].transpose(0, 1).float() for x in (k, v))
        queries = q[item].transpose(0, 1).float()
        o = functional.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=scale)[0]
        outputs.append(o.transpose(0, 1))
    return torch.stack(outputs).to(q.dtype)


def semantic_injection(
    cache_v: Tensor,
    spans: Tensor,
    old_signature: Tensor,
    new_signature: Tensor,
    rho: Tensor,
    mix: Tensor,
) -> tuple[Tensor, Tensor]:
    """The bridge of a prompt switch and the anchor of the segment that ends.

    cache_v [L,B,R,n,d]; spans int [B,5,3,2]: up to three ranges (start, length) of rows for each of last frame, frame
    before, bridge-recent, sink and anchor-recent; old_signature, new_signature float32 [B,n*d]; rho, mix float32 [B].
    A frame before of length 0 means fewer than two frames: nothing is projected out. A sink of length 0 means S = 0:
    the recent mean stands for it. Returns bridge [L,B,2,n,d] (sink, recent) and anchor [L,B,1,n,d], unscaled, in
    cache_v's dtype; computed in float32.
    Raises UsageError where last frame, bridge-recent or anchor-recent list no row: an empty cache has neither bridge
    nor anchor. The exported graphs cannot raise: there the mean of no rows is zero.
    """
    heads = cache_v.shape[3:]
    bridges, anchors = [], []
    for item, table in enumerate(spans.tolist()):
        means = [_mean(cache_v[:, item].float(), ranges) for ranges in table]  # [L,n,d] or None
        last, before, recent, sink, anchor = means
        if last is None or recent is None or anchor is None:
            raise UsageError(
                f"spans of item {item} are {table}: the first, third and fifth must list rows, for an empty cache has "
                "neither bridge nor anchor; inject after the first chunk was committed"
            )
        old, new = (
            signature[item].float().unflatten(0, heads) for signature in (old_signature, new_signature)
        )
        delta = (new - old).expand_as(recent)
        if before is not None:
            motion = last - before
            squared = motion.square().sum(-1, keepdim=True)
            along = (delta * motion).sum(-1, keepdim=True) / (squared + NORM_FLOOR)
            delta = torch.where(squared > NORM_FLOOR, delta - along * motion, delta)
        tokens = []
        for base in (recent if sink is None else sink, recent):
            gate = rho[item] * _cosine(base, delta).clamp(0, 1)
            tokens.append((1 - gate) * base + gate * delta)
        bridges.append(torch.stack(tokens, 1))
        anchors.append(((1 - mix[item]) * anchor + mix[item] * old).unsqueeze(1))
    dtype = cache_v.dtype
    return torch.stack(bridges, 1).to(dtype), torch.stack(anchors, 1).to(dtype)


def _mean(rows: Tensor, ranges: list[list[int]]) -> Tensor | None:
    """Mean of [L,R,n,d] over ranges of rows, [L,n,d]; None where there are none."""
    parts = [rows[:, start : start + length] for start, length in ranges if length]
    return torch.cat(parts, 1).mean(1) if parts else None


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per head of [L,n,d], [L,n,1]."""
    norms = [x.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR) for x in (a, b)]
    return (a * b).sum(-1, keepdim=True) / (norms[0] * norms[1])
