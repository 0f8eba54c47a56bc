"""The torch engine on an NVIDIA GPU: the reference's arithmetic, without what keeps a GPU waiting.

- The forward over a chunk is captured as CUDA graphs over buffers that all sessions share (export/chunk_forward.py).
  Step and window are data in device memory.
- Attention over the cache, injection and the placing of rows are this project's kernels (export/kernels), compiled for
  the GPU when the engine is made: nothing waits for the table's lengths. Where torch's own attention is faster, it
  serves windows of whole frames.
- torch.compile fuses the chains between matrix products: norm and modulation, RMS norm and rotation, gates. GELU is
  part of its product, and K and V are made where they are read (export/fused_blocks.py).
- The VAE's weights and caches lie channels last; it decodes on a stream of its own, beside the context pass, and in one
  thread, whose convolutions cuDNN prepares once (export/convolutions.py).
- All sessions of an engine share its two streams, and take turns where threads run several (export/lanes.py).
- What goes to the host or comes from it passes through pinned memory, and only x0, the frames and what an injection
  made are waited for.

What is an option can be measured (tests/gpu/engine.py). With `rehearse` the same code runs on the CPU,
with plain calls in the place of graphs and the torch reference in the place of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftvideo.runtime.engine import Float32, Float64, Frames, Int32, Prompt
from swiftvideo.runtime.errors import ClosedError, EngineUnavailableError, SettingsError, UsageError
from swiftvideo.runtime.geometry import Geometry
from swiftvideo.runtime.plugins.kernel import ATTENTION, INJECTION, PLACE
from swiftvideo.runtime.plugins.split import Split, workspace

from .chunk_forward import ChunkForward
from .convolutions import channels_last, fastest
from .fused_blocks import join_gelu, place_keys
from .graphs import Denoise
from .lanes import Lane, alone
from .models.backbone import CausalWanModel
from .models.schedule import Schedule
from .models.vae import StreamingDecoder
from .ops import dynamic_window_attention
from .torch_engine import TextEncoder, TorchEngine, TorchSession, array

COMPILED = ("qkv", "qkv_into", "after_self", "after_cross")
"""Methods of a block that torch.compile takes; their shapes are those of a chunk and of recaches."""


Attention = Literal["fastest", "kernel", "cudnn", "flash"]
"""Over windows of whole frames: this project's op, one of torch's, or what takes the least time by a margin."""


@dataclass(frozen=True, slots=True)
class Options:
    """What makes the engine fast; all of it unless something is to be measured."""

    graphs: bool = True
    kernels: bool = True
    compiled: bool = True
    joined_gelu: bool = True
    placed_keys: bool = True
    channels_last: bool = True
    attention: Attention = "fastest"

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
        self.denoising.attention = self.attend  # type: ignore[method-assign]
        self.lane, self.decoding = Lane(self.device), Lane(self.device)
        self.launchers: dict[str, Any] = {}
        self.split: Split | None = None
        self.partial: Tensor | None = None
        self.forwards: dict[int, ChunkForward] = {}
        self.attention_ms: dict[str, float | str] = {}
        """Milliseconds of each attention over the whole window, where that was measured; why one of torch's was not."""
        self._decode: Any = None if decoder is None else decoder.decode
        if self.options.joined_gelu:
            join_gelu(self.model)
        if self.options.placed_keys:
            place_keys(self.model)
        if self.device.type == "cuda":
            for parameter in self.model.parameters():  # those of a bundle may be transposed views
                parameter.data = parameter.data.contiguous()
            if self.options.kernels:
                self._compile_kernels()
            if self.options.compiled:
                compile_blocks(self.model)
                self._decode = self._decode and compile_decoding(self._decode)
        if self.decoder is not None and self.options.channels_last:
            channels_last(self.decoder)
            self.cache_format = torch.channels_last_3d
        for lane in (self.lane, self.decoding):
            lane.follow()  # the weights were moved and laid out in the caller's stream

    def _compile_kernels(self) -> None:
        from swiftvideo.runtime.plugins.launch import Launcher, cuda_driver

        from .bundle import DTYPES
        from .kernels.compiler import compile_all

        cuda_driver()
        major, minor = torch.cuda.get_device_capability(self.device)
        names = {value: name for name, value in DTYPES.items()}
        kernels = compile_all(10 * major + minor, names[self.model.dtype], self.geometry.head_dim)
        with torch.cuda.device(self.device):
            self.launchers = {op: Launcher(kernel) for op, kernel in kernels.items()}
            self.split = Split.of(self.launchers[ATTENTION])
        size = workspace(kernels[ATTENTION].spec) // 4
        self.partial = torch.empty(size, dtype=torch.float32, device=self.device)

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`; the prompt's K and V are there when this returns."""
        made = super().condition(embeds, text)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return made

    def decode(self, latents: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `TorchEngine.decode`. What is compiled is for whole chunks: a video's first, a frame short, is rare."""
        whole = latents.shape[1] == self.geometry.chunk
        with fastest(tried=whole):
            frames, new = (self._decode if whole else super().decode)(latents, caches)
        return frames, list(new)

    def open(self, batch: int = 1) -> CudaSession:
        """See `Engine.open`."""
        with self.lane():
            if batch not in self.forwards:
                self.forwards[batch] = ChunkForward(self, batch)
            return CudaSession(self, batch)

    def close(self) -> None:
        """See `Engine.close`. Graphs and buffers go; the models belong to the caller."""
        self.lane.wait()
        self.decoding.wait()
        for forward in self.forwards.values():
            forward.close()
        self.forwards, self.launchers, self.partial = {}, {}, None
        self.denoising.__dict__.pop("attention", None)

    @property
    def attention(self) -> str | None:
        """What attends over windows of whole frames: "kernel", "cudnn", "flash"; None before any chunk."""
        chosen = sorted({f.library or "kernel" for f in self.forwards.values() if f.prepared})
        return ", ".join(chosen) or None

    def crossed(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """K and V of a prompt, for the lane."""
        self.lane.borrow(*prompt.cross)
        k, v = prompt.cross
        return k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        segments: Tensor,
        *rest: float,
    ) -> Tensor:
        """`ops.dynamic_window_attention` by the kernel, where there is one. rest: layer, scale."""
        layer, scale = int(rest[0]), rest[1]
        if not self.launchers:
            return dynamic_window_attention(q, k, v, cache_k, cache_v, segments, layer, scale)
        batch, queries, heads, _ = q.shape
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        o = torch.empty_like(q)
        rows = cache_k.shape[2]
        assert self.split is not None
        for phase in self.split.phases(queries, heads, batch, rows):
            self.launch(
                ATTENTION,
                {"programs": phase.programs},
                *(q, k, v, cache_k, cache_v, segments, o, self.partial),
                *(layer, scale, batch, heads, queries, rows),
                *phase.arguments,
            )
        return o

    def launch(self, op: str, sizes: dict[str, int], *arguments: Any) -> None:
        """Launch a kernel into the lane's stream, which may be recording a graph. Only inside the lane."""
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        self.launchers[op].run(self.lane.handle, sizes, *values)


class CudaSession(TorchSession):
    """Tensors of one session on a GPU: its cache, its latents, the VAE's caches."""

    engine: CudaEngine

    def __init__(self, engine: CudaEngine, batch: int) -> None:
        self.lane, self.decoding = engine.lane, engine.decoding
        super().__init__(engine, batch)
        self.forward = engine.forwards[batch]
        self.state = object()
        """Another one whenever the cache changes."""

    def sent(self, value: NDArray[Any]) -> Tensor:
        """A tensor of the engine's lane; nothing waits for the copy."""
        return self.lane.send(value)

    def load(self, latents: Float32) -> None:
        """See `EngineSession.load`."""
        self._check_open()
        self.latents = self.sent(latents)

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
        if self.latents is None:
            raise UsageError("no latents are loaded: call load() first")
        with self.lane():
            if self.latents.shape[1] == self.engine.geometry.chunk:
                self.forward.run(self, step, noise, (time_cos, time_sin), segments, prompt)
            else:
                self._denoise_plain(self.latents, step, noise, (time_cos, time_sin), segments, prompt)

    def _denoise_plain(
        self,
        latents: Tensor,
        step: int,
        noise: Float32 | None,
        times: tuple[Float32, Float32],
        segments: Int32,
        prompt: Prompt,
    ) -> None:
        """Recaches: rare and of several lengths, so nothing is captured, and over the cache where it lies."""
        shape = (self.batch, latents.shape[1], self.engine.geometry.time_pairs)
        self.clean, self.latents, *fresh = self.engine.denoising(
            latents,
            torch.zeros_like(latents) if noise is None else self.sent(noise),
            torch.full((), step, device=self.engine.device),
            *(self.sent(np.broadcast_to(table, shape)) for table in times),
            self.cache_k,
            self.cache_v,
            self.sent(np.broadcast_to(segments, (self.batch, 6, 2))),
            *self.engine.crossed(prompt),
        )
        self.fresh = fresh[0], fresh[1]

    def x0(self) -> Float32:
        """See `EngineSession.x0`."""
        self._check_open()
        if self.clean is None:
            raise UsageError("nothing was denoised yet: call denoise() first")
        clean: Float32 = self.lane.download(self.clean).numpy()
        return clean

    def commit(self, ranges: Int32) -> None:
        """See `EngineSession.commit`; a second one needs another `denoise`."""
        with self._changing():
            super().commit(ranges)
            self.fresh = None
            self.forward.leave(self)

    def inject(
        self, spans: Int32, old: Float32, new: Float32, rho: Float32, mix: float
    ) -> tuple[Float32, Float32]:
        """See `EngineSession.inject`."""
        with self.lane():
            if not self.engine.launchers:
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
            self.engine.launch(
                INJECTION,
                {"heads": g.heads, "batch": batch, "layers": g.layers},
                *(self.cache_v, *inputs, bridge, anchor),
                *(batch, g.heads, g.rows),
            )
            return array(bridge), array(anchor)

    def write_memory(self, row: int, tokens: Float32) -> None:
        """See `EngineSession.write_memory`."""
        with self._changing():
            super().write_memory(row, tokens)

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_sink`."""
        with self._changing():
            super().place_sink(cos, sin)

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_memory`."""
        with self._changing():
            super().place_memory(cos, sin)

    def decode(self, latents: Float32) -> Frames:
        """See `EngineSession.decode`; on a stream of its own, so that it overlaps with the context pass."""
        self._check_open()
        return alone(self.engine.device, lambda: self._frames(latents))

    @torch.no_grad()
    def _frames(self, latents: Float32) -> Frames:
        with self.decoding():
            self._check_open()  # it may have been closed by who no longer waits for this
            video = self._video(self.decoding.send(latents))
        frames: Frames = self.decoding.download(video).numpy()
        return frames

    def export_state(self) -> dict[str, NDArray[Any]]:
        """See `EngineSession.export_state`."""
        self.decoding.wait()
        with self.lane():
            return super().export_state()

    def fetched(self, value: Tensor) -> Tensor:
        """See `TorchSession.fetched`; into pinned memory, which torch keeps for the next time: at the bus's speed."""
        return self.lane.download(value.detach().contiguous())

    def import_state(self, state: dict[str, NDArray[Any]]) -> None:
        """See `EngineSession.import_state`."""
        with self._changing():
            super().import_state(state)
            self.decoding.borrow(*self.vae_caches or ())
        self.lane.wait()

    def close(self) -> None:
        """See `EngineSession.close`."""
        with self.lane():
            self.forward.leave(self)
        self.lane.wait()
        with self.decoding():  # not while its thread still decodes for who no longer waits
            self.decoding.wait()
            super().close()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The lane, for what writes into the cache."""
        with self.lane():
            self.state = object()
            yield

    def _turn(self, source: Tensor, first: int, count: int, cos: Float64, sin: Float64) -> None:
        if not self.engine.launchers:
            super()._turn(source, first, count, cos, sin)
            return
        g = self.engine.geometry
        tables = [self.sent(table.astype(np.float32)) for table in (cos, sin)]
        self.engine.launch(
            PLACE,
            {"count": count, "heads": g.heads, "items": g.layers * self.batch},
            *(source, self.cache_k, *tables),
            *(source.shape[2], g.rows, first, count, g.heads, len(cos)),
        )

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this session was closed: open a new one")


def compile_blocks(model: CausalWanModel, backend: str = "inductor") -> None:
    """Let torch.compile make the pieces of every block, in place; the blocks share what is compiled."""
    for block in model.layers:
        for name in COMPILED:
            setattr(block, name, torch.compile(getattr(block, name), dynamic=False, backend=backend))


def compile_decoding(decode: Callable[..., Any]) -> Callable[..., Any]:
    """`StreamingDecoder.decode` by torch.compile."""
    # By default (4) Inductor writes the norm of a sum of tensors in float32 and reads it again to cast it.
    return torch.compile(decode, dynamic=False, options={"realize_reads_threshold": 16})
