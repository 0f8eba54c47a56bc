"""DynamicWindowAttention as a Triton kernel: online softmax over up to six segments of rows.

One program computes BLOCK_M queries of one head of one item. All segments are walked in one loop of blocks of BLOCK_N
keys, so the loads of the next blocks overlap with the arithmetic across a segment's end as well. Which rows a block
has is worked out from the table in device memory: a captured CUDA graph serves every window.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _segment(segments, index, blocks, limit, BLOCK_N: tl.constexpr):
    """(row of block 0 if the segment began there, row after the last, number of blocks up to its end).

    Cut to rows that are there: TensorRT may time its layers with whatever is in the table's memory.
    """
    start = tl.minimum(tl.maximum(tl.load(segments + 2 * index), 0), limit)
    length = tl.minimum(tl.maximum(tl.load(segments + 2 * index + 1), 0), limit - start)
    return start - blocks * BLOCK_N, start + length, blocks + tl.cdiv(length, BLOCK_N)


@triton.jit
def dynamic_window_attention(
    q,
    fresh_k,
    fresh_v,
    cache_k,
    cache_v,
    segments,
    o,
    layer,
    scale,
    batch,
    heads,
    queries,
    rows,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """o = attention of q over the listed rows (see `swiftvideo.export.ops.dynamic_window_attention`).

    q, fresh_k, fresh_v, o [batch,queries,heads,HEAD]; cache_k, cache_v [layers,batch,rows,heads,HEAD]; segments int32
    [batch,6,2]; scale > 0, float32. Without any key, o is zero. Grid: (ceil(queries / BLOCK_M), heads, batch).
    """
    head = tl.program_id(1)
    item = tl.program_id(2)
    width = heads * HEAD
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD
    fresh_item = item.to(tl.int64) * queries * width + head * HEAD
    cache_item = (layer.to(tl.int64) * batch + item) * rows * width + head * HEAD
    fresh_k += fresh_item
    fresh_v += fresh_item
    cache_k += cache_item
    cache_v += cache_item

    segments += item * 12
    limit = rows + queries
    base0, stop0, end0 = _segment(segments, 0, 0, limit, BLOCK_N)
    base1, stop1, end1 = _segment(segments, 1, end0, limit, BLOCK_N)
    base2, stop2, end2 = _segment(segments, 2, end1, limit, BLOCK_N)
    base3, stop3, end3 = _segment(segments, 3, end2, limit, BLOCK_N)
    base4, stop4, end4 = _segment(segments, 4, end3, limit, BLOCK_N)
    base5, stop5, end5 = _segment(segments, 5, end4, limit, BLOCK_N)

    mine = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = tl.minimum(mine, queries - 1).to(tl.int64) * width
    q_at = q + fresh_item + q_rows[:, None] + columns[None, :]
    if BLOCK_D == HEAD:
        queries_tile = tl.load(q_at)
    else:
        queries_tile = tl.load(q_at, mask=inside[None, :], other=0.0)

    scale *= LOG2_E
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    for block in tl.range(0, end5):
        base = tl.where(block < end0, base0, base1)
        stop = tl.where(block < end0, stop0, stop1)
        base = tl.where(block < end1, base, base2)
        stop = tl.where(block < end1, stop, stop2)
        base = tl.where(block < end2, base, base3)
        stop = tl.where(block < end2, stop, stop3)
        base = tl.where(block < end3, base, base4)
        stop = tl.where(block < end3, stop, stop4)
        base = tl.where(block < end4, base, base5)
        stop = tl.where(block < end4, stop, stop5)
        row = base + block * BLOCK_N + offsets
        # Rows past the segment's end repeat its last one: a finite value that then gets weight zero.
        near = tl.minimum(row, stop - 1)
        is_fresh = near >= rows
        at = tl.where(is_fresh, near - rows, near).to(tl.int64) * width
        k_at = tl.multiple_of(tl.where(is_fresh, fresh_k, cache_k) + at, 16)
        v_at = tl.multiple_of(tl.where(is_fresh, fresh_v, cache_v) + at, 16)
        if BLOCK_D == HEAD:
            keys = tl.load(k_at[:, None] + columns[None, :])
        else:
            keys = tl.load(k_at[:, None] + columns[None, :], mask=inside[None, :], other=0.0)
        scores = tl.dot(queries_tile, tl.trans(keys), input_precision="tf32x3")
        scores = tl.where((row < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        if BLOCK_D == HEAD:
            values = tl.load(v_at[:, None] + columns[None, :])
        else:
            values = tl.load(v_at[:, None] + columns[None, :], mask=inside[None, :], other=0.0)
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="tf32x3")
        highest = higher
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    o_at = o + fresh_item + mine.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(o_at, result.to(o.dtype.element_ty), mask=(mine < queries)[:, None] & inside[None, :])
