"""The forward over a chunk on a GPU: buffers that all sessions of an engine share, and the graphs captured over them.

Sessions take turns, chunk by chunk or pass by pass. What a chunk attends to is first copied together, the cached rows
right before the fresh ones: K and V are one block then, which any attention can read, at an address that graphs know.
That is done once per chunk, not once per pass: 5 GB read and written for the 1.3B model at a window of 12 frames, on an
H200 1.25 of 286 ms. A session has no buffers of its own, and nothing is captured when one begins (decision 0008).

Attention over that block is this project's kernel, or one of torch's (cuDNN, flash attention) where that is faster by a
margin. The kernel finds in device memory what its keys are, so one graph serves every table; torch's need their number,
so there is a graph for each window of whole frames, and the kernel serves what is left.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from swiftvideo.runtime.engine import Float32, Int32, Prompt
from swiftvideo.runtime.errors import ClosedError, OutOfMemoryError
from swiftvideo.runtime.geometry import WindowSettings

from .library_attention import LIBRARY, library_attention, passing
from .torch_engine import copy_rows, memory_for

if TYPE_CHECKING:
    from .cuda import CudaEngine, CudaSession

Rows = list[tuple[int, int]]
"""(start, length) of runs of rows."""

TRIALS = 10
"""Runs of each attention that are timed to find the faster."""
MARGIN = 0.9
"""Of the kernel's time, what torch's attention must stay below: the choice should not hang on noise.

On an H200 cuDNN's takes 0.95 of it over 7 frames and 0.97 over 12: at most 2 % of a forward.
"""
STEADY = WindowSettings().min_size
"""Frames of the window that most chunks have, over which attentions are compared."""


class ChunkForward:
    """The forward of an engine over a chunk of `batch` items. Use it inside the engine's lane."""

    def __init__(self, engine: CudaEngine, batch: int) -> None:
        g, device, dtype = engine.geometry, engine.device, engine.model.dtype
        self.engine, self.batch = engine, batch
        self.queries = g.chunk * g.frame_tokens
        shape = (batch, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
        times = (batch, g.chunk, g.time_pairs)

        def rows(count: int) -> list[Tensor]:
            size = (g.layers, batch, count, g.heads, g.head_dim)
            return [torch.zeros(size, dtype=dtype, device=device) for _ in range(2)]

        with memory_for(f"K and V of a window, batch {batch}, on {device}"):
            self.latents, self.noise, self.x0 = (torch.zeros(shape, device=device) for _ in range(3))
            self.time_cos, self.time_sin = (torch.zeros(times, device=device) for _ in range(2))
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.table = torch.zeros(batch, 6, 2, dtype=torch.int32, device=device)
            self.cross = rows(g.text_len)
            self.keys, self.values = rows(g.rows + self.queries)
        self.fresh = self.keys[:, :, g.rows :], self.values[:, :, g.rows :]
        self.module = copy.copy(engine.denoising)
        self.module.attention = self._attention  # type: ignore[method-assign]
        self.module.fresh = self.fresh
        self.library: str | None = None
        """Which of torch's attentions serves windows of whole frames; None: the kernel serves all."""
        self._graphs: dict[int, Callable[[], None]] = {}
        self._serving: tuple[int, str | None] = (0, None)
        self._closed = False
        self._held: tuple[object, Rows] | None = None
        self._prompt: Prompt | None = None
        self._owner: weakref.ref[CudaSession] | None = None

    def run(
        self,
        session: CudaSession,
        step: int,
        noise: Float32 | None,
        times: tuple[Float32, Float32],
        segments: Int32,
        prompt: Prompt,
    ) -> None:
        """`EngineSession.denoise` of a session whose latents are a chunk; they, its x0 and its fresh K and V follow."""
        if self._closed:
            raise ClosedError("the engine was closed: open another one")
        if not self._graphs:
            self._prepare()
        assert session.latents is not None
        lane = self.engine.lane
        self._release(session)
        if prompt is not self._prompt:
            self._prompt = None
            for mine, theirs in zip(self.cross, self.engine.crossed(prompt), strict=True):
                mine.copy_(theirs)
            self._prompt = prompt
        shown = self._gather(session, segments)
        self.step.fill_(step)
        self.latents.copy_(session.latents)
        if noise is not None:  # else the next sigma is 0, and whatever the buffer holds is finite
            lane.upload(self.noise, noise)
        for mine, value in zip((self.time_cos, self.time_sin), times, strict=True):
            lane.upload(mine, np.broadcast_to(value, mine.shape))
        self._graphs[shown if shown in self._graphs else 0]()
        session.latents, session.clean = self.latents.clone(), self.x0.clone()
        session.fresh, self._owner = self.fresh, weakref.ref(session)

    @property
    def prepared(self) -> bool:
        """Whether its graphs are there."""
        return bool(self._graphs)

    def leave(self, session: CudaSession) -> None:
        """The session's fresh K and V are no longer needed."""
        if self._owner is not None and self._owner() is session:
            self._owner = None

    def close(self) -> None:
        """Give back what graphs and buffers hold; the attention refers back to this."""
        self._closed, self._graphs = True, {}
        self.module.__dict__.pop("attention", None)

    def _release(self, session: CudaSession) -> None:
        """Another session's K and V that it has not committed yet become its own."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not session and owner.fresh is not None:
            owner.fresh = owner.fresh[0].clone(), owner.fresh[1].clone()
        self._owner = None

    def _gather(self, session: CudaSession, segments: Int32) -> int:
        """Put the listed cached rows before the fresh ones, unless they are there.

        Returns the number of keys if they are one block that ends with all fresh rows, else 0.
        """
        rows = self.engine.geometry.rows
        cached = [(a, min(a + n, rows) - a) for a, n in segments.tolist() if n and a < rows]
        fresh = _joined([(max(a, rows), a + n - max(a, rows)) for a, n in segments.tolist() if a + n > rows])
        at = rows - sum(length for _, length in cached)
        if self._held is None or self._held[0] is not session.state or self._held[1] != cached:
            self._held, row = None, at
            for start, length in cached:
                for mine, theirs in ((self.keys, session.cache_k), (self.values, session.cache_v)):
                    copy_rows(mine[:, :, row : row + length], theirs[:, :, start : start + length])
                row += length
            self._held = session.state, cached
        shown = _joined([(at, rows - at), *fresh])
        table = np.zeros((6, 2), np.int32)
        table[: len(shown)] = shown
        self.engine.lane.upload(self.table, np.broadcast_to(table, self.table.shape))
        return rows - at + self.queries if shown == [(at, rows - at + self.queries)] else 0

    def _prepare(self) -> None:
        """Capture the graph of every table, and with torch's attention one for each window of whole frames."""
        engine, pool = self.engine, self.engine.lane.pool()
        wanted: str = engine.options.attention
        if wanted == "fastest" and (engine.device.type != "cuda" or engine.model.dtype is torch.float32):
            wanted = "kernel"  # there is no choice: torch's take no float32
        try:
            library = self._fastest() if wanted == "fastest" else None if wanted == "kernel" else wanted
            graphs = {0: self._ready(0, None, pool, runs=3)}
            if library is not None:
                graphs |= self._of_windows(library, pool)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory for the forward over a chunk ({error}): use a smaller batch, window or resolution"
            ) from error
        self.library = library if len(graphs) > 1 else None
        self._graphs = graphs

    def _of_windows(self, library: str, pool: Any) -> dict[int, Callable[[], None]]:
        """The graphs for every window of whole frames; none if torch refuses one that nobody insisted on."""
        g = self.engine.geometry
        counts = range(self.queries, g.window * g.frame_tokens + 1, g.frame_tokens)
        try:  # all but the attention is compiled by now
            return {shown: self._ready(shown, library, pool, runs=1) for shown in counts}
        except RuntimeError as error:
            if not passing(error) or self.engine.options.attention != "fastest":
                raise
            self.engine.attention_ms[library] = str(error)
            return {}

    def _ready(self, shown: int, library: str | None, pool: Any, runs: int) -> Callable[[], None]:
        """The forward with `shown` keys by an attention of torch's; without: those of the table by the kernel."""

        def forward() -> None:
            self._serving = shown, library
            x0, following, *_ = self.module(
                *(self.latents, self.noise, self.step, self.time_cos, self.time_sin),
                *(self.keys, self.values, self.table, *self.cross),
            )
            self.x0.copy_(x0)
            self.latents.copy_(following)

        self._show(self.queries)
        return self.engine.lane.capture(forward, pool, runs) if self.engine.options.graphs else forward

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        """Attention over the block, whose last rows `k` and `v` are."""
        shown, library = self._serving
        if library is None:
            # No table reaches beyond the block: what would lie there is never read, and q stands for it.
            return self.engine.attend(q, q, q, *rest)
        layer, end = int(rest[3]), self.keys.shape[2]
        k, v = (block[layer, :, end - shown :] for block in (self.keys, self.values))
        return library_attention(library, q, k, v, rest[4])

    def _show(self, count: int) -> None:
        """A table of the block's last rows."""
        self.table.zero_()
        self.table[:, 0, 0], self.table[:, 0, 1] = self.keys.shape[2] - count, count

    def _fastest(self) -> str | None:
        """The attention of torch's that takes less time here over a steady window than the kernel, if there is one."""
        g, engine = self.engine.geometry, self.engine
        shown = min(g.window, max(g.chunk, STEADY or g.window)) * g.frame_tokens
        self._show(shown)
        for block in (self.keys[0], self.values[0]):  # zeros take less power
            block.normal_()
        shape = (self.batch, self.queries, g.heads, g.head_dim)
        q, k, v = (torch.randn(shape, device=engine.device).to(engine.model.dtype) for _ in range(3))

        def timed(library: str | None) -> float:
            self._serving = shown, library
            given = (q, k, v, self.keys, self.values, self.table, 0, g.head_dim**-0.5)
            return engine.lane.milliseconds(lambda: self._attention(*given), TRIALS)

        kernel = timed(None)
        engine.attention_ms, found = {"kernel": kernel}, {}
        for name in LIBRARY:
            try:
                found[name] = engine.attention_ms[name] = timed(name)
            except RuntimeError as error:
                if not passing(error):
                    raise
                engine.attention_ms[name] = str(error)
        best = min(found, key=lambda name: found[name], default=None)
        return best if best is not None and found[best] < MARGIN * kernel else None


def _joined(runs: Sequence[tuple[int, int]]) -> Rows:
    """Runs without the empty ones, neighbours made one."""
    made: Rows = []
    for start, length in runs:
        if made and made[-1][0] + made[-1][1] == start:
            made[-1] = made[-1][0], made[-1][1] + length
        elif length:
            made.append((start, length))
    return made
