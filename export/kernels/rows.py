"""Kernels that move cache rows: commit fresh K and V, and put rows at another place in time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def commit_rows(
    fresh_k,
    fresh_v,
    cache_k,
    cache_v,
    ranges,
    queries,
    rows,
    words,
    BLOCK: tl.constexpr,
):
    """Copy ranges of fresh rows into the cache, whatever their dtype.

    All tensors are seen as int32 words, `words` (a multiple of 4) to a row: fresh_k, fresh_v [items,queries,words];
    cache_k, cache_v [items,rows,words], items = layers * batch; ranges int32 [4,3] of (fresh start, row start,
    length), length 0 where unused. Grid: (ceil(queries * words / BLOCK), items, 8): two tensors of each range.
    """
    index = tl.program_id(2)
    item = tl.program_id(1).to(tl.int64)
    table = ranges + (index // 2) * 3
    start = tl.load(table).to(tl.int64)
    row = tl.load(table + 1).to(tl.int64)
    count = tl.load(table + 2) * words
    first = tl.program_id(0) * BLOCK
    if first < count:
        is_v = index % 2 == 1
        source = tl.where(is_v, fresh_v, fresh_k) + tl.multiple_of((item * queries + start) * words, 4)
        target = tl.where(is_v, cache_v, cache_k) + tl.multiple_of((item * rows + row) * words, 4)
        offsets = first + tl.arange(0, BLOCK)
        inside = offsets < tl.multiple_of(count, 4)
        tl.store(target + offsets, tl.load(source + offsets, mask=inside), mask=inside)


@triton.jit
def place_rows(
    source,
    target,
    cos,
    sin,
    source_rows,
    target_rows,
    target_first,
    count,
    heads,
    pairs,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """target rows = source rows with the time pairs, the first of each head, rotated by cos and sin.

    source [items,source_rows,heads,HEAD], its rows 0..count are read; target [items,target_rows,heads,HEAD], its rows
    target_first..target_first + count are written; cos, sin float32 [pairs], made in float64. A row may be its own
    source. Grid: (ceil(count / BLOCK_R), heads, items).
    """
    head = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    width = heads * HEAD
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None] & (columns < HEAD)[None, :]
    pair = tl.arange(0, BLOCK_D // 2)
    c = tl.load(cos + pair, mask=pair < pairs, other=1.0)[None, :]
    s = tl.load(sin + pair, mask=pair < pairs, other=0.0)[None, :]
    at = row.to(tl.int64)[:, None] * width + head * HEAD + columns[None, :]
    value = tl.load(source + item * source_rows * width + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [BLOCK_R, BLOCK_D // 2, 2]))
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_R, BLOCK_D])
    to = target + (item * target_rows + target_first) * width + at
    tl.store(to, turned.to(target.dtype.element_ty), mask=inside)
