"""The attention kernel on a GPU at the real shapes: its numbers, its speed, and what else could take its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from swiftvideo.export.kernels.compiler import Tiles, compile_kernel
from swiftvideo.export.lanes import milliseconds
from swiftvideo.runtime.plugins.kernel import ATTENTION, Kernel
from swiftvideo.runtime.plugins.launch import Launcher
from swiftvideo.runtime.plugins.split import Phase, Split, workspace

DEVICE = "cuda"
P, CHUNK, WINDOW, SINK, ANCHORS = 1560, 3, 12, 3, 4
HEADS, HEAD = 12, 128
ROWS = 2 + ANCHORS + WINDOW * P
QUERIES = CHUNK * P
LIMIT = 4e-3
"""Largest root mean square of errors over that of values. A bfloat16 keeps 8 bits: half a unit of the last is 2^-9; one
row of keys that is lost in a window of twelve frames is 6e-3."""
TUNING = [
    *(Tiles(128, 128, 8, s) for s in (2, 3)),
    *(Tiles(128, 64, 8, s) for s in (2, 3, 4)),
    *(Tiles(64, 64, 4, s) for s in (3, 4)),
    Tiles(64, 128, 4, 2),
]
"""Block sizes that fit sm90's shared memory; with Triton 3.6 none spills but 64 x 128, 8 bytes."""
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def segments(window: int) -> list[tuple[int, int]]:
    """The table of a late chunk: bridge and anchors, sink, the ring in two pieces, the chunk itself.

    Memory displaces the oldest tokens of the window, so the ring's oldest frame is cut (algorithm.md, 3.4).
    """
    memory = 2 + ANCHORS
    ring = window * P - SINK * P - memory - QUERIES
    first = memory + SINK * P
    if ring <= 0:
        fresh = QUERIES + ring
        return [(0, memory), (memory, SINK * P), (ROWS + QUERIES - fresh, fresh)]
    head = min(ring, 2 * P + 700)  # where the ring wraps
    pieces = [(ROWS - (ring - head), ring - head), (first, head)]
    return [(0, memory), (memory, SINK * P), *[p for p in pieces if p[1]], (ROWS, QUERIES)]


def table_of(pieces: list[tuple[int, int]]) -> Tensor:
    """int32 [1,6,2] on the GPU."""
    padded = pieces + [(0, 0)] * (6 - len(pieces))
    return torch.tensor([padded], dtype=torch.int32, device=DEVICE)


def stream() -> int:
    """The current stream's handle."""
    return int(torch.cuda.current_stream().cuda_stream)


def phases_of(launcher: Launcher, divided: bool) -> list[Phase]:
    """The launches of one attention; without `divided` every tile is one program's."""
    split = Split.of(launcher)
    if divided:
        return split.phases(QUERIES, HEADS, 1, ROWS)
    return split.divided(split.tiles(QUERIES, HEADS, 1), 0, 1)


class Attention:
    """Tensors of one attention and the launcher that computes it."""

    def __init__(self, kernel: Kernel, layers: int = 2, divided: bool = True) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=DEVICE).bfloat16()

        self.q, self.fresh_k, self.fresh_v = (normal(1, QUERIES, HEADS, HEAD) for _ in range(3))
        self.cache_k, self.cache_v = (normal(layers, 1, ROWS, HEADS, HEAD) for _ in range(2))
        self.o = torch.empty_like(self.q)
        self.table = table_of([])
        self.layer = layers - 1
        self.launcher = Launcher(kernel)
        self.phases = phases_of(self.launcher, divided)
        self.partial = torch.empty(workspace(kernel.spec) // 4, device=DEVICE)

    def __call__(self) -> None:
        """Put one attention into the current stream."""
        tensors = (self.q, self.fresh_k, self.fresh_v, self.cache_k, self.cache_v, self.table, self.o)
        pointers = [t.data_ptr() for t in (*tensors, self.partial)]
        scalars = (self.layer, HEAD**-0.5, 1, HEADS, QUERIES, ROWS)
        for phase in self.phases:
            self.launcher.run(stream(), {"programs": phase.programs}, *pointers, *scalars, *phase.arguments)

    def gathered(self, pieces: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """K and V of the listed rows, [1,n,keys,d]."""

        def pick(cache: Tensor, fresh: Tensor) -> Tensor:
            parts = []
            for start, length in pieces:
                source = cache[self.layer, 0] if start < ROWS else fresh[0]
                begin = start if start < ROWS else start - ROWS
                parts.append(source[begin : begin + length])
            return torch.cat(parts).transpose(0, 1)[None]

        return pick(self.cache_k, self.fresh_k), pick(self.cache_v, self.fresh_v)

    def exact(self, pieces: list[tuple[int, int]]) -> Tensor:
        """The result in float64, head by head, [1,N,n,d]."""
        k, v = self.gathered(pieces)
        heads = []
        for head in range(HEADS):
            logits = self.q[0, :, head].double() @ k[0, head].double().T * HEAD**-0.5
            heads.append(torch.softmax(logits, -1) @ v[0, head].double())
        return torch.stack(heads, 1)[None]


def windowed(kernel: Kernel, window: int, rate: float | None) -> dict[str, Any]:
    """Errors and speed at a window, beside scaled_dot_product_attention; rate: TFLOP/s of the machine's products."""
    work, pieces = Attention(kernel), segments(window)
    keys = sum(length for _, length in pieces)
    assert keys == window * P
    work.table.copy_(table_of(pieces))
    work.o.fill_(float("nan"))
    work()
    exact = work.exact(pieces)
    row = {
        "keys": keys,
        "largest_value": float(exact.abs().max()),
        **errors(work.o, exact),
        **speed(work, keys),
    }
    whole = Attention(kernel, divided=False)
    whole.table.copy_(work.table)
    row |= {"phases": [asdict(phase) for phase in work.phases], "undivided_ms": milliseconds(whole)}
    if rate is not None:
        row["share_of_matmul"] = row["tflops"] / rate
    return row | {"torch": {name: sdpa(work, pieces, exact, kind) for name, kind in BACKENDS.items()}}


def sdpa(
    work: Attention, pieces: list[tuple[int, int]], exact: Tensor, backend: SDPBackend
) -> dict[str, Any]:
    """What one of torch's attentions makes of the same keys: gathered before, as in a chunk, and gathered each time."""
    q, kept = work.q.transpose(1, 2), work.gathered(pieces)
    attend = functional.scaled_dot_product_attention
    try:
        with sdpa_kernel(backend):
            made = attend(q, *kept).transpose(1, 2)
            row = errors(made, exact) | speed(lambda: attend(q, *kept), sum(length for _, length in pieces))
            return row | {"with_gather_ms": milliseconds(lambda: attend(q, *work.gathered(pieces)))}
    except RuntimeError as error:  # that this GPU or this torch has none is a result
        return {"refused": str(error)[:300]}


def errors(made: Tensor, exact: Tensor) -> dict[str, float]:
    """Of a result, against float64."""
    wrong = made.double() - exact
    rms, value = (float(x.square().mean().sqrt()) for x in (wrong, exact))
    return {"max_error": float(wrong.abs().max()), "rms_error": rms, "relative_rms_error": rms / value}


def speed(work: Callable[[], object], keys: int) -> dict[str, float]:
    """Of an attention of all queries to `keys` keys."""
    took = milliseconds(work)
    return {"ms": took, "tflops": 4 * QUERIES * keys * HEADS * HEAD / took / 1e9}


def replayed(kernel: Kernel) -> dict[str, Any]:
    """One captured CUDA graph over two windows: only device memory changes in between."""
    work = Attention(kernel)
    work.table.copy_(table_of(segments(12)))
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    found = {}
    for window in (7, 12, 9):
        work.table.copy_(table_of(segments(window)))
        work.o.fill_(float("nan"))
        graph.replay()
        exact = work.exact(segments(window))
        found[str(window)] = errors(work.o, exact)["relative_rms_error"]
    return {"relative_rms_error_by_window": found}


def huge_logits(kernel: Kernel) -> dict[str, Any]:
    """Logits of thousands: the softmax is nearly one-hot, and nothing overflows."""
    work = Attention(kernel)
    work.q *= 100
    pieces = segments(9)
    work.table.copy_(table_of(pieces))
    work()
    return {"max_error": float((work.o.double() - work.exact(pieces)).abs().max())}


def tuned(tiles: Tiles, capability: int) -> dict[str, Any]:
    """Error and speed of the attention over nine frames with other block sizes."""
    pieces = segments(9)
    try:
        work = Attention(compile_kernel(ATTENTION, capability, "bf16", HEAD, tiles).kernel)
        work.table.copy_(table_of(pieces))
        work.o.fill_(float("nan"))
        work()
        found = errors(work.o, work.exact(pieces))
        row = {**found, "right": found["relative_rms_error"] < LIMIT, **speed(work, 9 * P)}
    except Exception as error:  # noqa: BLE001  # a size that does not compile or run is a result
        row = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"tiles": asdict(tiles), **row}
