"""SemanticInjection as a Triton kernel: one program makes the tokens of one head of one layer of one item."""

from __future__ import annotations

import triton
import triton.language as tl

NORM_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _mean(values, ranges, rows, width, columns, inside, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """(mean over up to three ranges of rows, number of rows); zeros where there are none. Cut to what is there."""
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    count = 0
    offsets = tl.arange(0, BLOCK_R)
    for index in range(3):
        start = tl.minimum(tl.maximum(tl.load(ranges + 2 * index), 0), rows)
        length = tl.minimum(tl.maximum(tl.load(ranges + 2 * index + 1), 0), rows - start)
        count += length
        for first in range(0, length, BLOCK_R):
            row = first + offsets
            at = values + (start + row).to(tl.int64)[:, None] * width + columns[None, :]
            sums += tl.load(at, mask=(row < length)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.sum(sums, 0) / tl.maximum(count, 1).to(tl.float32), count


@triton.jit
def _token(base, delta, rho):
    """base moved towards delta by rho times their cosine, where that is positive."""
    norms = tl.maximum(tl.sqrt(tl.sum(base * base)), NORM_FLOOR)
    norms *= tl.maximum(tl.sqrt(tl.sum(delta * delta)), NORM_FLOOR)
    gate = rho * tl.minimum(tl.maximum(tl.sum(base * delta) / norms, 0.0), 1.0)
    return (1.0 - gate) * base + gate * delta


@triton.jit
def semantic_injection(
    cache_v,
    spans,
    old_signature,
    new_signature,
    rho,
    mix,
    bridge,
    anchor,
    batch,
    heads,
    rows,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """bridge, anchor of a prompt switch (see `swiftvideo.export.ops.semantic_injection`).

    cache_v [layers,batch,rows,heads,HEAD]; spans int32 [batch,5,3,2]; signatures float32 [batch,heads*HEAD]; rho, mix
    float32 [batch]; bridge [layers,batch,2,heads,HEAD]; anchor [layers,batch,1,heads,HEAD].
    Grid: (heads, batch, layers).
    """
    head = tl.program_id(0)
    item = tl.program_id(1)
    place = tl.program_id(2).to(tl.int64) * batch + item
    width = heads * HEAD
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD
    values = cache_v + place * rows * width + head * HEAD
    ranges = spans + item * 30
    last, _ = _mean(values, ranges, rows, width, columns, inside, BLOCK_R, BLOCK_D)
    before, has_before = _mean(values, ranges + 6, rows, width, columns, inside, BLOCK_R, BLOCK_D)
    recent, _ = _mean(values, ranges + 12, rows, width, columns, inside, BLOCK_R, BLOCK_D)
    sink, has_sink = _mean(values, ranges + 18, rows, width, columns, inside, BLOCK_R, BLOCK_D)
    tail, _ = _mean(values, ranges + 24, rows, width, columns, inside, BLOCK_R, BLOCK_D)
    sink = tl.where(has_sink > 0, sink, recent)

    own = item.to(tl.int64) * width + head * HEAD + columns
    old = tl.load(old_signature + own, mask=inside, other=0.0)
    new = tl.load(new_signature + own, mask=inside, other=0.0)
    delta = new - old
    motion = last - before
    squared = tl.sum(motion * motion)
    projected = delta - tl.sum(delta * motion) / (squared + NORM_FLOOR) * motion
    delta = tl.where((has_before > 0) & (squared > NORM_FLOOR), projected, delta)

    strength = tl.load(rho + item)
    kind = bridge.dtype.element_ty
    at = bridge + place * 2 * width + head * HEAD + columns
    tl.store(at, _token(sink, delta, strength).to(kind), mask=inside)
    tl.store(at + width, _token(recent, delta, strength).to(kind), mask=inside)
    part = tl.load(mix + item)
    at = anchor + place * width + head * HEAD + columns
    tl.store(at, ((1.0 - part) * tail + part * old).to(kind), mask=inside)
