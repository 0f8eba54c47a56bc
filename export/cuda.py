"""The torch engine on an NVIDIA GPU: the reference's arithmetic, without what keeps a GPU waiting.

- The forward over a chunk is captured once per session as a CUDA graph over buffers that stay where they are. Window
  and step are data in device memory, so one graph serves every window and all five passes.
- Attention over the cache, injection and the placing of rows are this project's kernels (export/kernels), compiled for
  the GPU when the engine is made: no key is gathered, and nothing waits for the table's lengths.
- torch.compile fuses the chains between matrix products: norm and modulation, RMS norm and rotation, GELU, gates.
- The VAE's weights and caches lie channels last; it decodes on a stream of its own, beside the context pass.
- All sessions of an engine share its two streams, and take turns where threads run several (export/lanes.py).
- What goes to the host or comes from it passes through pinned memory, and only x0, the frames and what an injection
  made are waited for.

Each is an option, so that each can be measured (tests/gpu/engine.py). With `rehearse` the same code runs on the CPU,
with plain calls in the place of graphs and the torch reference in the place of kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swiftvideo.runtime.engine import Float32, Float64, Frames, Int32, Prompt
from swiftvideo.runtime.errors import ClosedError, EngineUnavailableError, SettingsError, UsageError
from swiftvideo.runtime.geometry import Geometry

from .graphs import Denoise
from .lanes import Lane
from .models.backbone import CausalWanModel
from .models.schedule import Schedule
from .models.vae import StreamingDecoder
from .ops import dynamic_window_attention
from .torch_engine import TextEncoder, TorchEngine, TorchSession, array

COMPILED = ("qkv", "add_self", "cross_query", "add_cross", "add_ffn")
"""Methods of a block that torch.compile takes; their shapes are those of a chunk and of recaches."""


@dataclass(frozen=True, slots=True)
class Options:
    """What makes the engine fast; all of it unless something is to be measured."""

    graphs: bool = True
    kernels: bool = True
    compiled: bool = True
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.graphs and not self.kernels:
            raise SettingsError(
                "graphs without kernels: the reference attention waits for the GPU, switch both off"
            )


class CudaEngine(TorchEngine):
    """`TorchEngine` on a GPU (see there for the arguments). The model is changed: it is this engine's from now on.

    options: what to leave out, for measurements. rehearse: allow the CPU.

    Raises:
        EngineUnavailableError: `device` is no GPU that torch can use; or cuda-python is not installed.
        SettingsError: as TorchEngine; or the GPU has no kernels.
    """

    def __init__(
        self,
        model: CausalWanModel,
        geometry: Geometry,
        schedule: Schedule | None = None,
        decoder: StreamingDecoder | None = None,
        text_encoder: TextEncoder | None = None,
        device: str | torch.device = "cuda",
        times: tuple[Tensor, Tensor] | None = None,
        options: Options | None = None,
        rehearse: bool = False,
    ) -> None:
        device = torch.device(device)
        if device.type != "cuda" and not rehearse:
            raise EngineUnavailableError(
                f"CudaEngine on {str(device)!r}: it needs a GPU; use TorchEngine on the CPU"
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailableError(
                f"torch {torch.__version__} sees no NVIDIA GPU: install a build of it for CUDA, or use 'cpu'"
            )
        self.options = options or Options()
        schedule = schedule or Schedule()
        module = Denoise(model, geometry, schedule)
        super().__init__(model, geometry, schedule, decoder, text_encoder, device, times)
        self.denoising = module.to(self.device)
        self.denoising.e, self.denoising.e0 = self.times
        self.lane, self.decoding = Lane(self.device), Lane(self.device)
        self.kernels: dict[str, Any] = {}
        self._decode: Any = super().decode
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.benchmark_limit = 4
            for parameter in self.model.parameters():  # those of a bundle may be transposed views
                parameter.data = parameter.data.contiguous()
            if self.options.kernels:
                self._compile_kernels()
            if self.options.compiled:
                compile_blocks(self.model)
                self._decode = torch.compile(self._decode, dynamic=False)
        if self.decoder is not None and self.options.channels_last:
            channels_last(self.decoder)
            self.cache_format = torch.channels_last_3d

    def _compile_kernels(self) -> None:
        from swiftvideo.runtime.plugins.launch import cuda_driver

        from .bundle import DTYPES
        from .kernels.compiler import compile_all

        cuda_driver()
        major, minor = torch.cuda.get_device_capability(self.device)
        names = {value: name for name, value in DTYPES.items()}
        self.kernels = dict(compile_all(10 * major + minor, names[self.model.dtype], self.geometry.head_dim))

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`; the prompt's K and V are there when this returns."""
        made = super().condition(embeds, text)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return made

    def decode(self, latents: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `TorchEngine.decode`. What is compiled is for whole chunks: a video's first, a frame short, is rare."""
        whole = latents.shape[1] == self.geometry.chunk
        frames, new = (self._decode if whole else super().decode)(latents, caches)
        return frames, list(new)

    def open(self, batch: int = 1) -> CudaSession:
        """See `Engine.open`."""
        return CudaSession(self, batch)


class _Buffers:
    """Inputs of forwards over a number of frames, at addresses that stay, and what the last forward made."""

    def __init__(self, session: CudaSession, frames: int) -> None:
        g, device, batch = session.engine.geometry, session.engine.device, session.batch
        shape = (batch, frames, g.latent_channels, g.latent_height, g.latent_width)
        self.latents, self.noise = (torch.zeros(shape, device=device) for _ in range(2))
        self.time_cos, self.time_sin = (
            torch.zeros(batch, frames, g.time_pairs, device=device) for _ in range(2)
        )
        self.captured = session.engine.options.graphs and frames == session.engine.geometry.chunk
        self.made: tuple[Tensor, Tensor, Tensor] | None = None
        self.run: Callable[[], None] | None = None


class CudaSession(TorchSession):
    """Tensors of one session on a GPU, and the captured graph of a chunk's forward."""

    engine: CudaEngine

    def __init__(self, engine: CudaEngine, batch: int) -> None:
        self.lane, self.decoding = engine.lane, engine.decoding
        with self.lane():
            super().__init__(engine, batch)
            g = engine.geometry
            self.step = torch.zeros((), dtype=torch.int64, device=engine.device)
            self.segments = torch.zeros(batch, 6, 2, dtype=torch.int32, device=engine.device)
            shape = (g.layers, batch, g.text_len, g.heads, g.head_dim)
            self.cross = tuple(
                torch.zeros(shape, dtype=engine.model.dtype, device=engine.device) for _ in range(2)
            )
        self.module = copy.copy(engine.denoising)  # shares everything but the attention
        self.launchers = self._launchers()
        self.module.attention = self._attention  # type: ignore[method-assign]
        self.prompt: Prompt | None = None
        self.buffers: dict[int, _Buffers] = {}
        self.current: _Buffers | None = None

    def sent(self, value: NDArray[Any]) -> Tensor:
        """A tensor of the engine's lane; nothing waits for the copy."""
        return self.lane.send(value)

    def load(self, latents: Float32) -> None:
        """See `EngineSession.load`."""
        self._check_open()
        frames = latents.shape[1]
        if frames not in self.buffers:
            with self.lane():
                self.buffers[frames] = _Buffers(self, frames)
        self.current = self.buffers[frames]
        self.lane.upload(self.current.latents, latents)

    @torch.no_grad()
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
        self._check_open()
        now, lane = self.current, self.lane
        if now is None:
            raise UsageError("no latents are loaded: call load() first")
        with lane():
            if prompt is not self.prompt:
                for mine, theirs in zip(self.cross, prompt.cross, strict=True):
                    mine.copy_(theirs)
                    if lane.stream is not None:
                        theirs.record_stream(lane.stream)
                self.prompt = prompt
            self.step.fill_(step)
        if noise is not None:  # else the next sigma is 0, and whatever the buffer holds is finite
            lane.upload(now.noise, noise)
        lane.upload(now.time_cos, np.broadcast_to(time_cos, now.time_cos.shape))
        lane.upload(now.time_sin, np.broadcast_to(time_sin, now.time_sin.shape))
        lane.upload(self.segments, np.broadcast_to(segments, self.segments.shape))
        if now.run is None:
            now.run = self._prepared(now)
        with lane():
            now.run()
        assert now.made is not None
        self.clean, self.fresh = now.made[0], now.made[1:]

    def x0(self) -> Float32:
        """See `EngineSession.x0`."""
        self._check_open()
        if self.clean is None:
            raise UsageError("nothing was denoised yet: call denoise() first")
        clean: Float32 = self.lane.download(self.clean).numpy()
        return clean

    def commit(self, ranges: Int32) -> None:
        """See `EngineSession.commit`; K and V of a recache, far larger than a chunk's, are given back."""
        with self.lane():
            super().commit(ranges)
        if self.current is not None and not self.current.captured:
            self.current.made = self.fresh = None

    def inject(
        self, spans: Int32, old: Float32, new: Float32, rho: Float32, mix: float
    ) -> tuple[Float32, Float32]:
        """See `EngineSession.inject`."""
        with self.lane():
            if not self.launchers:
                return super().inject(spans, old, new, rho, mix)
            g, batch = self.engine.geometry, self.batch
            values = (
                np.broadcast_to(spans, (batch, 5, 3, 2)),
                old,
                new,
                rho,
                np.full(batch, mix, np.float32),
            )
            inputs = [self.sent(value) for value in values]
            bridge, anchor = (self.cache_v.new_empty(g.layers, batch, k, g.heads, g.head_dim) for k in (2, 1))
            self._launch(
                "SemanticInjection",
                {"heads": g.heads, "batch": batch, "layers": g.layers},
                *(self.cache_v, *inputs, bridge, anchor),
                *(batch, g.heads, g.rows),
            )
            return array(bridge), array(anchor)

    def write_memory(self, row: int, tokens: Float32) -> None:
        """See `EngineSession.write_memory`."""
        with self.lane():
            super().write_memory(row, tokens)

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_sink`."""
        with self.lane():
            super().place_sink(cos, sin)

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_memory`."""
        with self.lane():
            super().place_memory(cos, sin)

    @torch.no_grad()
    def decode(self, latents: Float32) -> Frames:
        """See `EngineSession.decode`; on a stream of its own, so that it overlaps with the context pass."""
        self._check_open()
        with self.decoding():
            video = self._video(self.decoding.send(latents))
        frames: Frames = self.decoding.download(video).numpy()
        return frames

    def export_state(self) -> dict[str, NDArray[Any]]:
        """See `EngineSession.export_state`."""
        self.decoding.wait()
        with self.lane():
            return super().export_state()

    def import_state(self, state: dict[str, NDArray[Any]]) -> None:
        """See `EngineSession.import_state`."""
        with self.lane():
            super().import_state(state)
        self.lane.wait()  # the VAE's caches go to the other lane

    def close(self) -> None:
        """See `EngineSession.close`."""
        self.lane.wait()
        self.decoding.wait()
        for held in self.buffers.values():
            held.run = None  # this and the module's attention refer back: they would stay until Python looks for cycles
        self.module.__dict__.pop("attention", None)
        self.buffers, self.current, self.prompt, self.cross = {}, None, None, ()
        super().close()

    def _prepared(self, now: _Buffers) -> Callable[[], None]:
        """The forward over `now`: captured for a chunk; recaches are rare and of several lengths, so they are not."""

        def forward() -> None:
            x0, following, fresh_k, fresh_v = self.module(
                *(now.latents, now.noise, self.step, now.time_cos, now.time_sin),
                *(self.cache_k, self.cache_v, self.segments, *self.cross),
            )
            now.latents.copy_(following)
            now.made = x0, fresh_k, fresh_v

        if not now.captured:
            return forward
        with self.lane():  # after the upload, which is still on its way
            loaded = now.latents.clone()
        replay = self.lane.capture(forward)
        with self.lane():
            now.latents.copy_(loaded)  # capturing ran it
        return replay

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        segments: Tensor,
        *rest: float,
    ) -> Tensor:
        """`ops.dynamic_window_attention` by the kernel, where there is one."""
        layer, scale = int(rest[0]), rest[1]
        if not self.launchers:
            return dynamic_window_attention(q, k, v, cache_k, cache_v, segments, layer, scale)
        batch, queries, heads, _ = q.shape
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        o = torch.empty_like(q)
        self._launch(
            "DynamicWindowAttention",
            {"queries": queries, "heads": heads, "batch": batch},
            *(q, k, v, cache_k, cache_v, segments, o),
            *(layer, scale, batch, heads, queries, cache_k.shape[2]),
        )
        return o

    def _turn(self, source: Tensor, first: int, count: int, cos: Float64, sin: Float64) -> None:
        if not self.launchers:
            super()._turn(source, first, count, cos, sin)
            return
        g = self.engine.geometry
        tables = [self.sent(table.astype(np.float32)) for table in (cos, sin)]
        self._launch(
            "PlaceRows",
            {"count": count, "heads": g.heads, "items": g.layers * self.batch},
            *(source, self.cache_k, *tables),
            *(source.shape[2], g.rows, first, count, g.heads, len(cos)),
        )

    def _launchers(self) -> dict[str, Any]:
        if not self.engine.kernels:
            return {}
        from swiftvideo.runtime.plugins.launch import Launcher

        return {op: Launcher(kernel) for op, kernel in self.engine.kernels.items()}

    def _launch(self, op: str, sizes: dict[str, int], *arguments: Any) -> None:
        """Launch a kernel into the current stream, which may be recording a graph."""
        stream = int(torch.cuda.current_stream(self.engine.device).cuda_stream)
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        self.launchers[op].run(stream, sizes, *values)

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this session was closed: open a new one")


def compile_blocks(model: CausalWanModel, backend: str = "inductor") -> None:
    """Let torch.compile make the pieces of every block, in place; the blocks share what is compiled."""
    for block in model.layers:
        for name in COMPILED:
            setattr(block, name, torch.compile(getattr(block, name), dynamic=False, backend=backend))


def channels_last(decoder: StreamingDecoder) -> None:
    """Lay the convolutions' weights out channels last, in place; what they compute then is laid out so too."""
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            wide = isinstance(module, nn.Conv3d)
            layout = torch.channels_last_3d if wide else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
