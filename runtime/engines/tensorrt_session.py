"""A session on the TensorRT engine: its tensors in one arena, the captured graphs, the copies.

Two streams: one for everything that touches the cache, one for decoding, which needs nothing but latents from the host
and so runs beside the context pass. A staging buffer is written again only after its event says that its copy arrived.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.engine import Float32, Float64, Frames, Int32, Prompt
from swiftvideo.runtime.errors import ClosedError, EngineError, UsageError
from swiftvideo.runtime.plugins.kernel import COMMIT, PLACE
from swiftvideo.runtime.plugins.launch import Launcher, check

from .capturing import captured
from .cuda import Arena, Pinned, as_kept, layout, to_bits
from .state import Shape, check_state, floats

if TYPE_CHECKING:
    from .tensorrt import TensorRTEngine

Array = NDArray[Any]

RANGES = 4
"""Rows of a commit's table that the kernel takes."""


class TensorRTSession:
    """Tensors of one session (see `swiftvideo.runtime.engine.EngineSession`)."""

    def __init__(self, engine: TensorRTEngine) -> None:
        g, driver = engine.geometry, engine.driver
        self._engine, self._driver = engine, driver
        self._sink = (g.memory_rows, g.memory_rows + g.sink * g.frame_tokens)
        self._arena: Arena | None = None
        with ExitStack() as made:
            self._stream, self._decoding = engine.stream(made), engine.stream(made)
            arena = made.enter_context(closing(Arena(driver, self._tensors(), self._stream, "a session")))
            # One staging buffer per step of a chunk, each with an event: no copy overwrites one that still travels.
            uploaded = ("noise", "step", "time_cos", "time_sin", "segments")
            size = max(sum(map(arena.bytes_of, uploaded)) + 1024, arena.bytes_of("tokens"))
            pinned = [made.enter_context(closing(Pinned(driver, size))) for _ in range(g.steps + 1)]
            self._staging = [(buffer, self._event(made)) for buffer in pinned]
            back = max(arena.bytes_of(n) for n in ("x0", "frames", "bridge", "anchor"))
            self._back = made.enter_context(closing(Pinned(driver, back)))
            self._commit = Launcher(engine.kernels[COMMIT], driver)
            self._place = Launcher(engine.kernels[PLACE], driver)
            scratch = {"inject": "scratch", "decode_first": "decode_scratch", "decode": "decode_scratch"}
            self._contexts = {
                n: engine.context(n, arena, where) for n, where in scratch.items() if n in engine.networks
            }
            check(driver, driver.cuStreamSynchronize(self._stream), "clearing memory")
            self._made = made.pop_all()
        self._arena = arena
        self._replays: dict[int, Callable[[], None]] = {}
        self._prompt: Prompt | None = None
        self._frames = 0
        self._loaded = self._denoised = self._sink_saved = self._started = False
        self._turn = 0

    def _event(self, owner: ExitStack) -> Any:
        driver = self._driver
        event = check(driver, driver.cuEventCreate(0), "making an event")
        owner.callback(lambda: check(driver, driver.cuEventDestroy(event), "destroying an event"))
        return event

    def load(self, latents: Float32) -> None:
        """See `EngineSession.load`."""
        self._upload({"latents": latents})
        self._frames, self._loaded = latents.shape[1], True

    def denoise(
        self,
        step: int,
        noise: Float32 | None,
        time_cos: Float32,
        time_sin: Float32,
        segments: Int32,
        prompt: Prompt,
    ) -> None:
        """See `EngineSession.denoise`."""
        arena, driver = self._open(), self._driver
        if not self._loaded:
            raise UsageError("no latents are loaded: call load() first")
        if prompt is not self._prompt:
            for name in ("cross_k", "cross_v"):
                size = arena.bytes_of(name)
                code = driver.cuMemcpyDtoDAsync(arena[name], prompt.cross[name], size, self._stream)
                check(driver, code, "taking a prompt over")
            self._prompt = prompt
        # Without noise the next sigma is 0: whatever the buffer holds is multiplied by 0, and it is finite.
        values: dict[str, Array] = {"step": np.array(step), "time_cos": time_cos, "time_sin": time_sin}
        values |= {"segments": segments} | ({} if noise is None else {"noise": noise})
        self._upload(values)
        if self._frames not in self._replays:
            self._replays[self._frames] = self._capture(self._frames)
        self._replays[self._frames]()
        self._denoised = True

    def x0(self) -> Float32:
        """See `EngineSession.x0`."""
        shape = self._open().tensors["x0"][0]
        if not self._denoised:
            raise UsageError("nothing was denoised yet: call denoise() first")
        return self._download("x0", (1, self._frames, *shape[2:]), self._stream)

    def commit(self, ranges: Int32) -> None:
        """See `EngineSession.commit`."""
        arena, g = self._open(), self._engine.geometry
        if not self._denoised:
            raise UsageError("there is nothing to commit: call denoise() first")
        table = np.zeros((RANGES, 3), np.int32)
        table[: len(ranges)] = ranges
        self._upload({"ranges": table})
        queries, words = self._frames * g.frame_tokens, self._row_bytes() // 4
        sizes = {"queries": queries, "words": words, "items": g.layers, "copies": 2 * RANGES}
        names = ("fresh_k", "fresh_v", "cache_k", "cache_v", "ranges")
        self._commit.run(int(self._stream), sizes, *(arena[n] for n in names), queries, g.rows, words)
        first, end = self._sink
        if any(first <= row < end for _, row, _ in ranges.tolist()):
            self._sink_saved = False

    def inject(
        self, spans: Int32, old: Float32, new: Float32, rho: Float32, mix: float
    ) -> tuple[Float32, Float32]:
        """See `EngineSession.inject`."""
        arena = self._open()
        self._upload(
            {"spans": spans, "old_signature": old, "new_signature": new, "rho": rho, "mix": np.array([mix])}
        )
        inputs = ("cache_v", "spans", "old_signature", "new_signature", "rho", "mix")
        tensors: dict[str, tuple[int, Shape | None]] = {n: (arena[n], arena.tensors[n][0]) for n in inputs}
        tensors |= {n: (arena[n], None) for n in ("bridge", "anchor")}
        self._engine.bind(self._contexts["inject"], tensors)
        self._engine.execute(self._contexts["inject"], self._stream)
        bridge, anchor = (self._download(n, arena.tensors[n][0], self._stream) for n in ("bridge", "anchor"))
        return bridge, anchor

    def write_memory(self, row: int, tokens: Float32) -> None:
        """See `EngineSession.write_memory`."""
        arena, count = self._open(), tokens.shape[2]
        self._upload({"tokens": tokens})
        for name in ("cache_k", "cache_v"):
            self._put(arena["tokens"], arena[name], count, self._engine.geometry.rows, row, count, 0)

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_sink`."""
        arena, rows = self._open(), self._engine.geometry.rows
        first, end = self._sink
        count = end - first
        if not self._sink_saved:
            self._put(arena["cache_k"] + first * self._row_bytes(), arena["sink_k"], rows, count, 0, count, 0)
            self._sink_saved = True
        self._upload({"cos": cos, "sin": sin})
        self._put(arena["sink_k"], arena["cache_k"], count, rows, first, count, len(cos))

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_memory`."""
        arena, g = self._open(), self._engine.geometry
        self._upload({"cos": cos, "sin": sin})
        self._put(arena["cache_v"], arena["cache_k"], g.rows, g.rows, 0, g.memory_rows, len(cos))

    def decode(self, latents: Float32) -> Frames:
        """See `EngineSession.decode`."""
        self._open()
        parts = []
        if not self._started:
            parts.append(self._decode("decode_first", latents[:, :1]))
            self._started = True
            latents = latents[:, 1:]
        if latents.shape[1]:
            parts.append(self._decode("decode", latents))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def export_state(self) -> dict[str, Array]:
        """See `EngineSession.export_state`."""
        arena, driver, caches = self._open(), self._driver, self._engine.vae_caches
        self._wait()
        names = ("cache_k", "cache_v", "sink_k", *caches)
        # Room for all of them, also where some are left out: so the memory of one copy is as large as the next one's.
        offsets, size = layout({name: arena.tensors[name] for name in names})
        address, memory = self._engine.pinned.take(size)
        state = {}
        for name in names:
            if self._sink_saved if name == "sink_k" else self._started or name not in caches:
                (shape, dtype), at, size = arena.tensors[name], offsets[name], arena.bytes_of(name)
                code = driver.cuMemcpyDtoHAsync(address + at, arena[name], size, self._stream)
                check(driver, code, f"copying {name}")
                state[name] = as_kept(memory[at : at + size], dtype).reshape(shape)
        check(driver, driver.cuStreamSynchronize(self._stream), "copying a session")
        return state

    def import_state(self, state: dict[str, Array]) -> None:
        """See `EngineSession.import_state`."""
        arena, caches = self._open(), self._engine.vae_caches
        groups = [
            {n: arena.tensors[n][0] for n in names} for names in (["cache_k", "cache_v"], ["sink_k"], caches)
        ]
        check_state(state, *groups)
        self._wait()
        for name, value in state.items():
            self._upload_all(name, value)
        self._sink_saved, self._started = "sink_k" in state, not state.keys().isdisjoint(caches)

    def close(self) -> None:
        """See `EngineSession.close`."""
        if self._arena is None:
            return
        self._engine.enter()
        self._arena = self._prompt = None
        try:
            for stream in (self._stream, self._decoding):
                check(self._driver, self._driver.cuStreamSynchronize(stream), "closing a session")
        finally:
            self._replays, self._contexts = {}, {}
            self._made.close()

    # -- pieces --------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, tuple[Shape, str]]:
        """Every tensor of a session: (shape, dtype). Those with frames have room for a window, for recaches."""
        engine, g = self._engine, self._engine.geometry
        dtype, heads = engine.dtype, (g.heads, g.head_dim)
        video = (1, g.window, g.latent_channels, g.latent_height, g.latent_width)
        fresh = (g.layers, 1, g.window * g.frame_tokens, *heads)
        cache = (g.layers, 1, g.rows, *heads)
        cross = (g.layers, 1, g.text_len, *heads)
        pairs = ((g.time_pairs,), "fp32")
        tensors: dict[str, tuple[Shape, str]] = {
            **dict.fromkeys(("latents", "noise", "x0", "next_latents"), (video, "fp32")),
            "step": ((), "int64"),
            **dict.fromkeys(("time_cos", "time_sin"), ((1, g.window, g.time_pairs), "fp32")),
            "segments": ((1, 6, 2), "int32"),
            **dict.fromkeys(("cross_k", "cross_v"), (cross, dtype)),
            **dict.fromkeys(("fresh_k", "fresh_v"), (fresh, dtype)),
            **dict.fromkeys(("cache_k", "cache_v"), (cache, dtype)),
            "sink_k": ((g.layers, 1, max(1, g.sink * g.frame_tokens), *heads), dtype),
            "ranges": ((RANGES, 3), "int32"),
            "cos": pairs,
            "sin": pairs,
            "tokens": ((g.layers, 1, max(2, g.max_anchors), *heads), dtype),
            "spans": ((1, 5, 3, 2), "int32"),
            **dict.fromkeys(("old_signature", "new_signature"), ((1, g.dim), "fp32")),
            **dict.fromkeys(("rho", "mix"), ((1,), "fp32")),
            "bridge": ((g.layers, 1, 2, *heads), dtype),
            "anchor": ((g.layers, 1, 1, *heads), dtype),
            "vae_latents": ((1, g.chunk, *video[2:]), "fp32"),
            "frames": ((1, g.chunk * g.temporal_stride, g.height, g.width, 3), "uint8"),
        }
        tensors["scratch"] = engine.scratch("denoise", "inject")
        tensors["decode_scratch"] = engine.scratch("decode_first", "decode")
        for name in engine.vae_caches:  # read by one decoding, written for the next
            tensors[name] = tensors[f"new_{name}"] = engine.described("decode", name, {0: 1})
        return tensors

    def _capture(self, frames: int) -> Callable[[], None]:
        """What denoises `frames` frames and loads the re-noised latents: the launch of a captured graph.

        Each number of frames has a context of its own, for a captured one may not see another shape. All share their
        scratch memory, since they run one after the other.
        """
        arena, driver, stream, engine = self._open(), self._driver, self._stream, self._engine
        context = engine.context("denoise", arena, "scratch")
        tensors: dict[str, tuple[int, Shape | None]] = {}
        for name in engine.inputs("denoise"):
            shape = arena.tensors[name][0]
            timed = name in ("latents", "noise", "time_cos", "time_sin")
            tensors[name] = (arena[name], (1, frames, *shape[2:]) if timed else shape)
        tensors |= {n: (arena[n], None) for n in ("x0", "next_latents", "fresh_k", "fresh_v")}
        engine.bind(context, tensors)
        size = arena.bytes_of("latents") * frames // engine.geometry.window

        def run() -> None:
            engine.execute(context, stream)
            code = driver.cuMemcpyDtoDAsync(arena["latents"], arena["next_latents"], size, stream)
            check(driver, code, "denoising")

        # Outside the capture first: TensorRT sets itself up, and plugins load their modules, on the first run. It
        # changes nothing that the replay does not write again.
        engine.execute(context, stream)
        check(driver, driver.cuStreamSynchronize(stream), "the first run of denoise")
        # TensorRT-RTX can be asked; TensorRT says so by failing.
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(stream)):
            return _uncaptured(run, "TensorRT-RTX cannot capture its plan")
        try:
            graph = captured(driver, stream, run)
        except EngineError as error:
            if capturable is not None:
                raise
            return _uncaptured(run, str(error))
        try:
            made = check(driver, driver.cuGraphInstantiate(graph, 0), "capturing denoise")
        finally:
            check(driver, driver.cuGraphDestroy(graph), "capturing denoise")
        self._made.callback(lambda: check(driver, driver.cuGraphExecDestroy(made), "closing a session"))

        def replay(_: Any = context) -> None:  # what was captured belongs to the context
            check(driver, driver.cuGraphLaunch(made, stream), "denoising")

        return replay

    def _decode(self, graph: str, latents: Float32) -> Frames:
        """Frames of latents by `decode_first` or `decode`, on the stream for decoding."""
        arena, driver, stream, engine = self._open(), self._driver, self._decoding, self._engine
        self._upload({"vae_latents": latents}, stream)
        stride = engine.geometry.temporal_stride
        count = latents.shape[1] * stride if graph == "decode" else 1
        tensors: dict[str, tuple[int, Shape | None]] = {"latents": (arena["vae_latents"], latents.shape)}
        if graph == "decode":
            tensors |= {n: (arena[n], arena.tensors[n][0]) for n in engine.vae_caches}
        tensors |= {f"new_{n}": (arena[f"new_{n}"], None) for n in engine.vae_caches}
        tensors["frames"] = (arena["frames"], None)
        engine.bind(self._contexts[graph], tensors)
        engine.execute(self._contexts[graph], stream)
        for name in engine.vae_caches:
            size = arena.bytes_of(name)
            check(
                driver, driver.cuMemcpyDtoDAsync(arena[name], arena[f"new_{name}"], size, stream), "decoding"
            )
        shape = arena.tensors["frames"][0]
        frames: Frames = self._download("frames", (1, count, *shape[2:]), stream)
        return frames

    def _put(
        self, source: int, target: int, rows: int, into: int, first: int, count: int, pairs: int
    ) -> None:
        """`count` rows of a tensor with `rows` rows to rows `first`... of one with `into`, rotated if `pairs`."""
        arena, g = self._open(), self._engine.geometry
        sizes = {"count": count, "heads": g.heads, "items": g.layers}
        tables = (arena["cos"], arena["sin"])
        self._place.run(
            int(self._stream), sizes, source, target, *tables, rows, into, first, count, g.heads, pairs
        )

    def _upload(self, values: dict[str, Array], stream: Any = None) -> None:
        """Copy host arrays into the arena through the next staging buffer, without waiting for them to arrive."""
        arena, driver = self._open(), self._driver
        stream = self._stream if stream is None else stream
        turn = self._turn
        self._turn = (turn + 1) % len(self._staging)
        staging, event = self._staging[turn]
        check(driver, driver.cuEventSynchronize(event), "waiting for a copy")
        at = 0
        for name, value in values.items():
            flat = to_bits(value, arena.tensors[name][1]).reshape(-1).view(np.uint8)
            if at + len(flat) > staging.size or len(flat) > arena.bytes_of(name):
                raise UsageError(
                    f"{name} of shape {value.shape} is larger than a session's: {arena.tensors[name][0]}"
                )
            staging.array[at : at + len(flat)] = flat
            code = driver.cuMemcpyHtoDAsync(arena[name], staging.address + at, len(flat), stream)
            check(driver, code, f"copying {name}")
            at += -(-len(flat) // 16) * 16
        check(driver, driver.cuEventRecord(event, stream), "recording a copy")

    def _download(self, name: str, shape: Shape, stream: Any) -> Array:
        """The beginning of a tensor as an array of its own, after everything in the stream."""
        arena, driver = self._open(), self._driver
        dtype = arena.tensors[name][1]
        size = arena.bytes_of(name) // max(1, int(np.prod(arena.tensors[name][0]))) * int(np.prod(shape))
        check(
            driver, driver.cuMemcpyDtoHAsync(self._back.address, arena[name], size, stream), f"copying {name}"
        )
        check(driver, driver.cuStreamSynchronize(stream), f"computing {name}")
        return self._back.take(shape, dtype)

    def _upload_all(self, name: str, value: Array) -> None:
        """Set a whole tensor, however large, through a buffer made for it."""
        arena, driver = self._open(), self._driver
        dtype, size = arena.tensors[name][1], arena.bytes_of(name)
        kept = dtype == "bf16" and value.dtype == np.uint16
        buffer = Pinned(driver, size)
        try:
            buffer.put(value if kept else to_bits(floats(value), dtype))
            code = driver.cuMemcpyHtoDAsync(arena[name], buffer.address, size, self._stream)
            check(driver, code, f"copying {name}")
            check(driver, driver.cuStreamSynchronize(self._stream), f"copying {name}")
        finally:
            buffer.close()

    def _wait(self) -> None:
        for stream in (self._stream, self._decoding):
            check(self._driver, self._driver.cuStreamSynchronize(stream), "waiting for the session")

    def _row_bytes(self) -> int:
        g = self._engine.geometry
        return g.dim * (4 if self._engine.dtype == "fp32" else 2)

    def _open(self) -> Arena:
        if self._arena is None:
            raise ClosedError("this session was closed: open a new one")
        self._engine.enter()
        return self._arena


def _uncaptured(run: Callable[[], None], reason: str) -> Callable[[], None]:
    """What denoises without a graph: right, and slower by what launching every kernel costs."""
    warnings.warn(
        f"denoise runs without a CUDA graph, which is slower: {reason}", RuntimeWarning, stacklevel=2
    )
    return run
