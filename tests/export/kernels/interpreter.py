"""The kernels in Triton's interpreter, in a child process of its own: the interpreter must be chosen before import.

    with Interpreter() as run:
        o = run.attention(q, fresh_k, ..., layer, scale, keys=16, queries=16)

Tensors are torch tensors on the CPU. The interpreter keeps bfloat16 as bare bits and multiplies those in `tl.dot`, and
truncates where hardware rounds; the child puts both right.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftvideo.export.kernels.compiler import block_width
from swiftvideo.runtime.plugins.split import Split


class Interpreter:
    """A child process that runs kernels; `close` ends it."""

    def __init__(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)
            self._pool.submit(int).result()
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before

    def attention(
        self,
        *arguments: Any,
        queries: int = 16,
        keys: int = 16,
        split: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """`ops.dynamic_window_attention` by the kernel, with tiles of queries x keys.

        split: how many of the last tiles are computed in pieces, and in how many each.
        """
        result: Tensor = self._pool.submit(_attention, arguments, queries, keys, split).result()
        return result

    def injection(self, *arguments: Any, block: int = 8) -> tuple[Tensor, Tensor]:
        """`ops.semantic_injection` by the kernel."""
        result: tuple[Tensor, Tensor] = self._pool.submit(_injection, arguments, block).result()
        return result

    def commit(
        self, fresh: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], ranges: Tensor
    ) -> list[Tensor]:
        """The caches [L,B,R,n,d] after `commit_rows` of fresh [L,B,N,n,d]."""
        result: list[Tensor] = self._pool.submit(_commit, fresh, cache, ranges).result()
        return result

    def place(
        self, source: Tensor, target: Tensor, cos: Tensor, sin: Tensor, first: int, count: int
    ) -> Tensor:
        """The target after `place_rows`. One tensor given twice is rotated in place."""
        same = source is target
        result: Tensor = self._pool.submit(_place, source, target, cos, sin, first, count, same).result()
        return result

    def close(self) -> None:
        """End the child."""
        self._pool.shutdown()


def _prepare() -> None:
    """Correct the interpreter's bfloat16 in this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    convert = interpreter._convert_float

    def rounded(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            tensor = torch.from_numpy(np.ascontiguousarray(value)).bfloat16()
            return tensor.view(torch.int16).numpy().view(np.uint16)
        return convert(value, source, target, mode)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        x, y = (
            convert(item.data, item.dtype.scalar, tl.float32, None).view(np.float32)
            if item.dtype.scalar == tl.bfloat16
            else item.data
            for item in (a, b)
        )
        return interpreter.TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = dot


def _attention(arguments: tuple[Any, ...], block_m: int, block_n: int, split: tuple[int, int]) -> Tensor:
    from swiftvideo.export.kernels.attention import dynamic_window_attention

    q, fresh_k, fresh_v, cache_k, cache_v, segments, layer, scale = arguments
    batch, queries, heads, head = q.shape
    o = torch.full_like(q, float("nan"))
    width, merged = block_width(head), 8
    partial = torch.full((max(1, split[0] * split[1]) * block_m * (width + 2),), float("nan"))
    divided = Split(block_m, block_n, width, merged, slots=1)
    for phase in divided.divided(divided.tiles(queries, heads, batch), *split):
        dynamic_window_attention[(phase.programs,)](
            *(q, fresh_k, fresh_v, cache_k, cache_v, segments, o, partial),
            *(layer, scale, batch, heads, queries, cache_k.shape[2]),
            *phase.arguments,
            HEAD=head,
            BLOCK_D=width,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            MERGED=merged,
        )
    return o


def _injection(arguments: tuple[Any, ...], block: int) -> tuple[Tensor, Tensor]:
    from swiftvideo.export.kernels.injection import semantic_injection

    cache_v = arguments[0]
    layers, batch, rows, heads, head = cache_v.shape
    bridge = cache_v.new_full((layers, batch, 2, heads, head), float("nan"))
    anchor = cache_v.new_full((layers, batch, 1, heads, head), float("nan"))
    semantic_injection[(heads, batch, layers)](
        *arguments, bridge, anchor, batch, heads, rows, HEAD=head, BLOCK_D=block_width(head), BLOCK_R=block
    )
    return bridge, anchor


def _commit(
    fresh: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], ranges: Tensor, block: int = 64
) -> list[Tensor]:
    from swiftvideo.export.kernels.rows import commit_rows

    layers, batch, queries, heads, head = fresh[0].shape
    rows = cache[0].shape[2]
    words = heads * head * fresh[0].element_size() // 4
    tensors = [item.clone().view(torch.int32) for item in (*fresh, *cache)]
    grid = (-(-queries * words // block), layers * batch, 8)
    commit_rows[grid](*tensors, ranges, queries, rows, words, BLOCK=block)
    return [item.view(fresh[0].dtype) for item in tensors[2:]]


def _place(
    source: Tensor, target: Tensor, cos: Tensor, sin: Tensor, first: int, count: int, same: bool
) -> Tensor:
    from swiftvideo.export.kernels.rows import place_rows

    layers, batch, rows, heads, head = target.shape
    target = target.clone()  # the sender's tensor lies in shared memory
    place_rows[(-(-count // 8), heads, layers * batch)](
        *(target if same else source, target, cos, sin, source.shape[2], rows, first, count, heads, len(cos)),
        HEAD=head,
        BLOCK_D=block_width(head),
        BLOCK_R=8,
    )
    return target
