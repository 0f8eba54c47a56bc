"""DynamicWindowAttention as a Triton kernel: online softmax over up to six segments of rows.

One program computes a tile, BLOCK_M queries of one head of one item. Keys come in blocks of BLOCK_N. What is left at a
segment's end, and before the border between the cache and the fresh rows, comes first and is masked. All blocks that
lie whole within a segment and within one tensor follow in one loop without masks, so the loads of the next blocks
overlap with the arithmetic across a segment's end as well. Which rows a block has is worked out from the table in
device memory: a captured CUDA graph serves every window.

Tiles that would not fill the GPU once more are split: several programs take a part of a tile's blocks each and write
their sums, and a second launch of the same kernel merges them (swiftvideo.runtime.plugins.split says which).
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
def _place(block, whole, rows, BLOCK_N: tl.constexpr):
    """(whether a whole block lies in the fresh rows, its first row in its tensor). whole: `_whole` of all segments."""
    base, turn, skip, _ = whole[5]
    for index in tl.static_range(4, -1, -1):
        own_base, own_turn, own_skip, end = whole[index]
        own = block < end
        base = tl.where(own, own_base, base)
        turn = tl.where(own, own_turn, turn)
        skip = tl.where(own, own_skip, skip)
    is_fresh = block >= turn
    return is_fresh, base + block * BLOCK_N + tl.where(is_fresh, skip - rows, 0)


@triton.jit
def _at(is_fresh, row, fresh, cache, width, tile):
    """Addresses of a block that begins at a row. tile: what each of its elements is behind the first."""
    return tl.multiple_of(tl.where(is_fresh, fresh, cache) + row.to(tl.int64) * width, 16) + tile


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """A tile whose columns beyond the head are zero. Without a mask loads are asynchronous."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def _scores(queries, keys):
    """Products of all queries and keys, not scaled."""
    return tl.dot(queries, tl.trans(keys), input_precision="tf32x3")


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
def _write(
    o, tile, rows, values, queries, heads, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Results of some rows of a tile into o."""
    item, head, first = _of(tile, queries, heads, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mine = first + rows
    width = heads * HEAD
    at = (
        o
        + item.to(tl.int64) * queries * width
        + head * HEAD
        + mine.to(tl.int64)[:, None] * width
        + columns[None, :]
    )
    tl.store(at, values.to(o.dtype.element_ty), mask=(mine < queries)[:, None] & (columns < HEAD)[None, :])


@triton.jit
def _of(tile, queries, heads, BLOCK_M: tl.constexpr):
    """(item, head, first query) of a tile."""
    blocks = tl.cdiv(queries, BLOCK_M)
    return tile // (blocks * heads), tile // blocks % heads, tile % blocks * BLOCK_M


@triton.jit
def _merge(
    o,
    partial,
    queries,
    heads,
    unsplit,
    pieces,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MERGED: tl.constexpr,
):
    """MERGED rows of a tile from the sums of its pieces."""
    over = tl.program_id(0) // (BLOCK_M // MERGED)
    mine = tl.program_id(0) % (BLOCK_M // MERGED) * MERGED + tl.arange(0, MERGED)
    columns = tl.arange(0, BLOCK_D)
    highest = tl.full([MERGED], float("-inf"), tl.float32)
    total = tl.zeros([MERGED], tl.float32)
    sums = tl.zeros([MERGED, BLOCK_D], tl.float32)
    for piece in tl.range(0, pieces):
        at = partial + (over * pieces + piece).to(tl.int64) * (BLOCK_M * (BLOCK_D + 2))
        theirs = tl.load(at + BLOCK_M * BLOCK_D + mine)
        higher = tl.maximum(highest, theirs)
        base = tl.where(higher > float("-inf"), higher, 0.0)  # a piece without keys has -inf and zeros
        fade, weight = tl.exp2(highest - base), tl.exp2(theirs - base)
        total = total * fade + tl.load(at + BLOCK_M * (BLOCK_D + 1) + mine) * weight
        values = tl.load(at + mine[:, None] * BLOCK_D + columns[None, :])
        sums = sums * fade[:, None] + values * weight[:, None]
        highest = higher
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    _write(o, unsplit + over, mine, result, queries, heads, HEAD, BLOCK_D, BLOCK_M)


@triton.jit
def dynamic_window_attention(
    q,
    fresh_k,
    fresh_v,
    cache_k,
    cache_v,
    segments,
    o,
    partial,
    layer,
    scale,
    batch,
    heads,
    queries,
    rows,
    unsplit,
    pieces,
    merging,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGED: tl.constexpr,
):
    """o = attention of q over the listed rows (see `swiftvideo.export.ops.dynamic_window_attention`).

    q, fresh_k, fresh_v, o [batch,queries,heads,HEAD]; cache_k, cache_v [layers,batch,rows,heads,HEAD]; segments int32
    [batch,6,2]; scale > 0, float32. Without any key, o is zero.

    Tiles from `unsplit` on are computed by `pieces` programs each, which write sums, largest logits and totals to
    `partial`, float32 [tile, piece, BLOCK_M * (BLOCK_D + 2)]; launched again with `merging`, BLOCK_M / MERGED programs
    a tile make o of them.
    """
    if merging:
        _merge(o, partial, queries, heads, unsplit, pieces, HEAD, BLOCK_D, BLOCK_M, MERGED)
    else:
        _attend(
            q,
            fresh_k,
            fresh_v,
            cache_k,
            cache_v,
            segments,
            o,
            partial,
            layer,
            scale,
            batch,
            heads,
            queries,
            rows,
            unsplit,
            pieces,
            HEAD,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit
def _attend(
    q,
    fresh_k,
    fresh_v,
    cache_k,
    cache_v,
    segments,
    o,
    partial,
    layer,
    scale,
    batch,
    heads,
    queries,
    rows,
    unsplit,
    pieces,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile, or one piece of one."""
    over = tl.program_id(0) - unsplit
    split = over >= 0
    tile = tl.where(split, unsplit + over // pieces, tl.program_id(0))
    piece = tl.where(split, over % pieces, 0)
    item, head, first_query = _of(tile, queries, heads, BLOCK_M)
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
    whole0 = _whole(segments, 0, 0, rows, limit, BLOCK_N)
    whole1 = _whole(segments, 1, whole0[3], rows, limit, BLOCK_N)
    whole2 = _whole(segments, 2, whole1[3], rows, limit, BLOCK_N)
    whole3 = _whole(segments, 3, whole2[3], rows, limit, BLOCK_N)
    whole4 = _whole(segments, 4, whole3[3], rows, limit, BLOCK_N)
    whole5 = _whole(segments, 5, whole4[3], rows, limit, BLOCK_N)
    whole = (whole0, whole1, whole2, whole3, whole4, whole5)
    first = tl.where(split, whole5[3] * piece // pieces, 0)
    blocks = tl.where(split, whole5[3] * (piece + 1) // pieces, whole5[3])

    mine = tl.arange(0, BLOCK_M)
    q_rows = tl.minimum(first_query + mine, queries - 1).to(tl.int64) * width
    q_at = q + fresh_item + q_rows[:, None] + columns[None, :]
    queries_tile = _load(q_at, inside, BLOCK_D == HEAD)

    scale *= LOG2_E
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    tile_of_keys = offsets[:, None] * width + columns[None, :]
    for rest in tl.range(
        0, 12, num_stages=1
    ):  # of each segment, cached and fresh; all of them the first piece's
        start, length, cached = _segment(segments, rest // 2, rows, limit)
        is_fresh = rest % 2 == 1
        count = tl.where(is_fresh, length - cached, cached) % BLOCK_N
        if tl.where(piece == 0, count, 0) > 0:
            row = start + tl.where(is_fresh, length - rows, cached) - count
            there = offsets < count
            shown = there[:, None] & inside[None, :]
            keys = tl.load(_at(is_fresh, row, fresh_k, cache_k, width, tile_of_keys), mask=shown, other=0.0)
            values = tl.load(_at(is_fresh, row, fresh_v, cache_v, width, tile_of_keys), mask=shown, other=0.0)
            scores = tl.where(there[None, :], _scores(queries_tile, keys), float("-inf"))
            highest, total, sums = _fold(scores, values, highest, total, sums, scale)
    for block in tl.range(first, blocks):
        is_fresh, row = _place(block, whole, rows, BLOCK_N)
        keys = _load(_at(is_fresh, row, fresh_k, cache_k, width, tile_of_keys), inside, BLOCK_D == HEAD)
        scores = _scores(queries_tile, keys)
        values = _load(_at(is_fresh, row, fresh_v, cache_v, width, tile_of_keys), inside, BLOCK_D == HEAD)
        highest, total, sums = _fold(scores, values, highest, total, sums, scale)
    if split:
        at = partial + over.to(tl.int64) * (BLOCK_M * (BLOCK_D + 2))
        tl.store(at + mine[:, None] * BLOCK_D + columns[None, :], sums)
        tl.store(at + BLOCK_M * BLOCK_D + mine, highest)
        tl.store(at + BLOCK_M * (BLOCK_D + 1) + mine, total)
    else:
        result = sums / tl.where(total > 0, total, 1.0)[:, None]
        _write(o, tile, mine, result, queries, heads, HEAD, BLOCK_D, BLOCK_M)
