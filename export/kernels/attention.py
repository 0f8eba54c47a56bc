"""DynamicWindowAttention as a Triton kernel: online softmax over up to six segments of rows.

One program computes BLOCK_M queries of one head of one item. Keys come in blocks of BLOCK_N. What is left at a
segment's end, and before the border between the cache and the fresh rows, comes first and is masked. All blocks that
lie whole within a segment and within one tensor follow in one loop without masks, so the loads of the next blocks
overlap with the arithmetic across a segment's end as well. Which rows a block has is worked out from the table in
device memory: a captured CUDA graph serves every window.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _segment(segments, index, rows, limit):
    """(first row, rows, rows of these in the cache) of a segment.

    Cut to rows that are there: TensorRT may time its layers with whatever is in the table's memory.
    """
    start = tl.minimum(tl.maximum(tl.load(segments + 2 * index), 0), limit)
    length = tl.minimum(tl.maximum(tl.load(segments + 2 * index + 1), 0), limit - start)
    return start, length, tl.minimum(tl.maximum(rows - start, 0), length)


@triton.jit
def _whole(segments, index, blocks, rows, limit, BLOCK_N: tl.constexpr):
    """A segment's whole blocks, which follow `blocks` others.

    Returns (row of block 0 if the segment began there, first block in the fresh rows, rows that are left out before
    it, number of blocks up to the segment's end).
    """
    start, length, cached = _segment(segments, index, rows, limit)
    turn = blocks + cached // BLOCK_N
    return start - blocks * BLOCK_N, turn, cached % BLOCK_N, turn + (length - cached) // BLOCK_N


@triton.jit
def _later(block, end, base, turn, skip, next_base, next_turn, next_skip):
    """Of two segments' blocks the first one's up to `end`, then the second one's."""
    mine = block < end
    return tl.where(mine, base, next_base), tl.where(mine, turn, next_turn), tl.where(mine, skip, next_skip)


@triton.jit
def _fold(scores, values, highest, total, sums, scale):
    """Add a block of keys to the running softmax. scale holds log2(e)."""
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    fade = tl.exp2(highest - higher)
    total = total * fade + tl.sum(weights, 1)
    sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="tf32x3")
    return higher, total, sums


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
    base0, turn0, skip0, end0 = _whole(segments, 0, 0, rows, limit, BLOCK_N)
    base1, turn1, skip1, end1 = _whole(segments, 1, end0, rows, limit, BLOCK_N)
    base2, turn2, skip2, end2 = _whole(segments, 2, end1, rows, limit, BLOCK_N)
    base3, turn3, skip3, end3 = _whole(segments, 3, end2, rows, limit, BLOCK_N)
    base4, turn4, skip4, end4 = _whole(segments, 4, end3, rows, limit, BLOCK_N)
    base5, turn5, skip5, end5 = _whole(segments, 5, end4, rows, limit, BLOCK_N)

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
    tile = offsets[:, None] * width + columns[None, :]
    for rest in tl.range(0, 12, num_stages=1):  # of each segment in the cache and in the fresh rows
        start, length, cached = _segment(segments, rest // 2, rows, limit)
        in_cache = rest % 2 == 0
        count = tl.where(in_cache, cached, length - cached) % BLOCK_N
        if count > 0:
            row = start + tl.where(in_cache, cached, length - rows) - count
            there = (offsets < count)[:, None] & inside[None, :]
            k_at = tl.multiple_of(tl.where(in_cache, cache_k, fresh_k) + row.to(tl.int64) * width, 16) + tile
            v_at = tl.multiple_of(tl.where(in_cache, cache_v, fresh_v) + row.to(tl.int64) * width, 16) + tile
            keys = tl.load(k_at, mask=there, other=0.0)
            values = tl.load(v_at, mask=there, other=0.0)
            scores = tl.dot(queries_tile, tl.trans(keys), input_precision="tf32x3")
            scores = tl.where((offsets < count)[None, :], scores, float("-inf"))
            highest, total, sums = _fold(scores, values, highest, total, sums, scale)
    for block in tl.range(0, end5):
        base, turn, skip = _later(block, end4, base4, turn4, skip4, base5, turn5, skip5)
        base, turn, skip = _later(block, end3, base3, turn3, skip3, base, turn, skip)
        base, turn, skip = _later(block, end2, base2, turn2, skip2, base, turn, skip)
        base, turn, skip = _later(block, end1, base1, turn1, skip1, base, turn, skip)
        base, turn, skip = _later(block, end0, base0, turn0, skip0, base, turn, skip)
        fresh = block >= turn
        row = base + block * BLOCK_N + tl.where(fresh, skip - rows, 0)
        k_at = tl.multiple_of(tl.where(fresh, fresh_k, cache_k) + row.to(tl.int64) * width, 16) + tile
        v_at = tl.multiple_of(tl.where(fresh, fresh_v, cache_v) + row.to(tl.int64) * width, 16) + tile
        if BLOCK_D == HEAD:
            keys = tl.load(k_at)
        else:
            keys = tl.load(k_at, mask=inside[None, :], other=0.0)
        scores = tl.dot(queries_tile, tl.trans(keys), input_precision="tf32x3")
        if BLOCK_D == HEAD:
            values = tl.load(v_at)
        else:
            values = tl.load(v_at, mask=inside[None, :], other=0.0)
        highest, total, sums = _fold(scores, values, highest, total, sums, scale)
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    o_at = o + fresh_item + mine.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(o_at, result.to(o.dtype.element_ty), mask=(mine < queries)[:, None] & inside[None, :])
