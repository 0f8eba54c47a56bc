"""The reference engine: the same session as every other engine runs, in plain PyTorch on a CPU or a GPU.

It computes from the models themselves, without any exported graph, and is written to be read and compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftvideo.runtime.engine import Float32, Float64, Frames, Int32, Int64, Prompt
from swiftvideo.runtime.engines.state import check_state
from swiftvideo.runtime.errors import ClosedError, OutOfMemoryError, SettingsError, UsageError
from swiftvideo.runtime.geometry import Geometry

from .models.backbone import CausalWanModel
from .models.schedule import Schedule
from .models.vae import StreamingDecoder
from .ops import dynamic_window_attention, semantic_injection

TextEncoder = Callable[[Tensor, Tensor], Tensor]
"""ids [B,T], mask [B,T] -> embeds [B,T,text_dim], zero where masked."""


class TorchEngine:
    """Engine over the PyTorch models (see `swiftvideo.runtime.engine.Engine`).

    Args:
        model: the backbone; moved to `device` and put into evaluation mode.
        geometry: shapes; layers, heads and text sizes must be the model's.
        schedule: denoising steps, as many as `geometry.steps`, and the context pass.
        decoder: the VAE, or None: then sessions cannot decode.
        text_encoder: or None: then only `condition` makes prompts.
        device: where everything lives.
        times: (e [steps+1,D], e0 [steps+1,6,D]) of the schedule's passes, for a model without its time MLP, which
            bundles leave out; None: computed.

    Raises:
        SettingsError: model, geometry and schedule contradict each other.
    """

    name = "torch"
    cache_format = torch.preserve_format
    """How sessions keep the VAE's caches."""

    def __init__(
        self,
        model: CausalWanModel,
        geometry: Geometry,
        schedule: Schedule | None = None,
        decoder: StreamingDecoder | None = None,
        text_encoder: TextEncoder | None = None,
        device: str | torch.device = "cpu",
        times: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        config = model.config
        theirs = (config.num_layers, config.num_heads, config.head_dim, config.in_channels, config.patch)
        ours = (geometry.layers, geometry.heads, geometry.head_dim, geometry.latent_channels, geometry.patch)
        if theirs != ours:
            raise SettingsError(
                f"layers, heads, head_dim, channels, patch are {theirs} in the model and {ours} in the geometry: "
                "make the geometry with BackboneConfig.geometry()"
            )
        schedule = schedule or Schedule()
        if len(schedule.steps) != geometry.steps:
            raise SettingsError(
                f"the schedule has {len(schedule.steps)} steps, geometry.steps is {geometry.steps}: they must agree"
            )
        self.geometry = geometry
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.decoder = None if decoder is None else decoder.eval().to(self.device)
        self.text_encoder = text_encoder
        self.sigmas = schedule.pass_sigmas.tolist()
        self.space = model.space_rope(
            geometry.latent_height // geometry.patch[1],
            geometry.latent_width // geometry.patch[2],
            self.device,
        )
        if times is None:
            with torch.no_grad():
                e, e0 = model.time_embed(torch.tensor(schedule.passes, device=self.device)[None])
            times = e[0], e0[0]
        self.times = times[0].to(self.device), times[1].to(self.device)

    @property
    def threads(self) -> int | None:
        """Of torch on the CPU; None on a GPU."""
        return torch.get_num_threads() if self.device.type == "cpu" else None

    @torch.no_grad()
    def encode(self, ids: Int64, mask: Int64, text: str) -> Prompt:
        """See `Engine.encode`."""
        if self.text_encoder is None:
            raise UsageError("this engine was made without a text encoder: give it one, or use condition()")
        embeds = self.text_encoder(self.tensor(ids), self.tensor(mask))
        return self.condition(array(embeds), text)

    @torch.no_grad()
    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`."""
        given = self.tensor(embeds)
        context = self.model.embed_text(given)
        signature = self.model.signature(given, context)
        return Prompt(text, array(signature), self.model.cross_kv(context))

    def decode(self, latents: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`StreamingDecoder.decode`, for those that make it faster."""
        assert self.decoder is not None
        return self.decoder.decode(latents, caches)

    def open(self, batch: int = 1) -> TorchSession:
        """See `Engine.open`."""
        return TorchSession(self, batch)

    def close(self) -> None:
        """Nothing is held beyond the models, which belong to the caller."""

    def tensor(self, value: NDArray[Any]) -> Tensor:
        """A numpy array on the engine's device."""
        return torch.tensor(value, device=self.device)


class TorchSession:
    """Tensors of one session (see `swiftvideo.runtime.engine.EngineSession`)."""

    def __init__(self, engine: TorchEngine, batch: int) -> None:
        g = engine.geometry
        self.engine = engine
        self.batch = batch
        shape = (g.layers, batch, g.rows, g.heads, g.head_dim)
        with memory_for(f"two caches of shape {shape} on {engine.device}"):
            self.cache_k = torch.zeros(shape, dtype=engine.model.dtype, device=engine.device)
            self.cache_v = torch.zeros_like(self.cache_k)
        self.sink_k: Tensor | None = None  # committed K of the sink while `cache_k` holds placed ones
        self.vae_caches: list[Tensor] | None = None
        self.latents: Tensor | None = None
        self.clean: Tensor | None = None
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.closed = False

    def sent(self, value: NDArray[Any]) -> Tensor:
        """A tensor on the engine's device, for those that send it otherwise."""
        return self.engine.tensor(value)

    def load(self, latents: Float32) -> None:
        """See `EngineSession.load`."""
        self.latents = self.engine.tensor(latents)

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
        engine, x = self.engine, _there(self.latents, self.closed)
        table = engine.tensor(segments).expand(self.batch, 6, 2)
        scale = engine.geometry.head_dim**-0.5

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dynamic_window_attention(q, k, v, self.cache_k, self.cache_v, table, layer, scale)

        shape = (self.batch, x.shape[1])
        e, e0 = (table[step][None, None] for table in engine.times)
        flow, *fresh = engine.model(
            x,
            e.expand(*shape, -1),
            e0.expand(*shape, -1, -1),
            engine.tensor(time_cos).expand(*shape, -1),
            engine.tensor(time_sin).expand(*shape, -1),
            *prompt.cross,
            attend=attend,
            space=engine.space,
        )
        self.fresh = (fresh[0], fresh[1])
        clean = (x.double() - engine.sigmas[step] * flow.double()).float()
        self.clean = self.latents = clean
        if noise is not None:
            sigma = engine.sigmas[step + 1]
            self.latents = (1 - sigma) * clean + sigma * engine.tensor(noise)

    def x0(self) -> Float32:
        """See `EngineSession.x0`."""
        return array(_there(self.clean, self.closed))

    def commit(self, ranges: Int32) -> None:
        """See `EngineSession.commit`."""
        if self.fresh is None:
            raise UsageError("there is nothing to commit: call denoise() first")
        first, end = self._sink_rows()
        for start, row, length in ranges.tolist():
            for cache, fresh in zip((self.cache_k, self.cache_v), self.fresh, strict=True):
                copy_rows(cache[:, :, row : row + length], fresh[:, :, start : start + length])
            if first <= row < end:
                self.sink_k = None

    @torch.no_grad()
    def inject(
        self, spans: Int32, old: Float32, new: Float32, rho: Float32, mix: float
    ) -> tuple[Float32, Float32]:
        """See `EngineSession.inject`."""
        bridge, anchor = semantic_injection(
            self.cache_v,
            self.sent(spans).expand(self.batch, 5, 3, 2),
            self.sent(old),
            self.sent(new),
            self.sent(rho),
            torch.full((self.batch,), mix, device=self.engine.device),
        )
        return array(bridge), array(anchor)

    def write_memory(self, row: int, tokens: Float32) -> None:
        """See `EngineSession.write_memory`."""
        value = self.sent(tokens).to(self.cache_k.dtype)
        self.cache_k[:, :, row : row + value.shape[2]] = value
        self.cache_v[:, :, row : row + value.shape[2]] = value

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_sink`."""
        first, end = self._sink_rows()
        if self.sink_k is None:
            self.sink_k = self.cache_k[:, :, first:end].clone()
        self._turn(self.sink_k, first, end - first, cos, sin)

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_memory`."""
        self._turn(self.cache_v, 0, self.engine.geometry.memory_rows, cos, sin)

    @torch.no_grad()
    def decode(self, latents: Float32) -> Frames:
        """See `EngineSession.decode`."""
        video: Frames = self._video(self.engine.tensor(latents)).cpu().numpy()
        return video

    def _video(self, x: Tensor) -> Tensor:
        """The next latents [B,F,C,h,w] as uint8 [B,n,H,W,3] on their device; the VAE's caches go on."""
        decoder, frames = self.engine.decoder, []
        if decoder is None:
            raise UsageError("this engine was made without a decoder: give it one to get frames")
        caches = self.vae_caches
        if caches is None:
            first, caches = decoder.decode_first(x[:, :1])
            frames.append(first)
            x = x[:, 1:]
        if x.shape[1]:
            later, caches = self.engine.decode(x, caches)
            frames.append(later)
        self.vae_caches = self._kept(caches)
        return frames[0] if len(frames) == 1 else torch.cat(frames, 1)

    def _kept(self, caches: list[Tensor]) -> list[Tensor] | None:
        """Copies: each is the end of an activation, all of which it would keep, six times as much."""
        return [cache.clone(memory_format=self.engine.cache_format) for cache in caches] or None

    def export_state(self) -> dict[str, NDArray[Any]]:
        """See `EngineSession.export_state`."""
        kept = {"cache_k": self.cache_k, "cache_v": self.cache_v}
        if self.sink_k is not None:
            kept["sink_k"] = self.sink_k
        kept |= {f"vae_cache_{index}": cache for index, cache in enumerate(self.vae_caches or ())}
        with memory_for("a copy of a session"):
            return {name: bits(self.fetched(value)) for name, value in kept.items()}

    def fetched(self, value: Tensor) -> Tensor:
        """A contiguous copy on the host, for those that fetch it otherwise."""
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)

    def import_state(self, state: dict[str, NDArray[Any]]) -> None:
        """See `EngineSession.import_state`."""
        g, decoder = self.engine.geometry, self.engine.decoder
        layers, batch, _, *heads = shape = tuple(self.cache_k.shape)
        first, end = self._sink_rows()
        vae = decoder.cache_shapes(batch, g.latent_height, g.latent_width) if decoder is not None else []
        caches = {f"vae_cache_{index}": shape for index, shape in enumerate(vae)}
        sink = {"sink_k": (layers, batch, end - first, *heads)}
        check_state(state, {"cache_k": shape, "cache_v": shape}, sink, caches)
        dtype = self.cache_k.dtype

        def tensor(value: NDArray[Any]) -> Tensor:
            if value.dtype == np.uint16:
                return self.engine.tensor(value.view(np.int16)).view(torch.bfloat16)
            return self.engine.tensor(value)

        self.cache_k.copy_(tensor(state["cache_k"]))  # in place: captured graphs know where they lie
        self.cache_v.copy_(tensor(state["cache_v"]))
        self.sink_k = tensor(state["sink_k"]).to(dtype) if "sink_k" in state else None
        vae_dtype = decoder.dtype if decoder is not None else dtype
        self.vae_caches = self._kept([tensor(state[name]).to(vae_dtype) for name in caches if name in state])

    def close(self) -> None:
        """See `EngineSession.close`."""
        self.closed = True
        self.cache_k = self.cache_v = torch.empty(0)
        self.sink_k = self.vae_caches = self.latents = self.clean = self.fresh = None

    def _sink_rows(self) -> tuple[int, int]:
        g = self.engine.geometry
        return g.memory_rows, g.memory_rows + g.sink * g.frame_tokens

    def _turn(self, source: Tensor, first: int, count: int, cos: Float64, sin: Float64) -> None:
        """K of rows first.. = rows 0..count of source [L,B,rows,n,d], their time pairs, which come first, rotated."""
        c, s, width = self.sent(cos), self.sent(sin), 2 * len(cos)
        keys = source[:, :, :count]
        even, odd = keys[..., 0:width:2].double(), keys[..., 1:width:2].double()
        turned = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
        self.cache_k[:, :, first : first + count] = torch.cat((turned.to(keys.dtype), keys[..., width:]), -1)


NO_MEMORY = 2
"""cudaErrorMemoryAllocation, which is how torch says that no memory of the host can be page-locked."""


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Allocations inside raise OutOfMemoryError, naming what they are for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        failed = isinstance(error, torch.AcceleratorError)  # the GPU, whatever was asked of it
        if failed and getattr(error, "error_code", None) != NO_MEMORY:
            raise
        raise OutOfMemoryError(
            f"no memory for {what} ({error}): use a smaller batch, window or resolution"
        ) from error


def copy_rows(target: Tensor, source: Tensor) -> None:
    """Copy K or V, [L,B,k,n,d], as words of 8 bytes where d allows: a GPU copies rows of several layers by elements."""
    if target.shape[-1] * target.element_size() % 8 == 0:
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


def array(value: Tensor) -> Float32:
    """A tensor as a float32 array of its own."""
    copied: Float32 = value.detach().float().cpu().clone().numpy()
    return copied


def bits(value: Tensor) -> NDArray[Any]:
    """A contiguous tensor of the host as an array, without a copy; bfloat16 as uint16."""
    narrow = value.dtype == torch.bfloat16
    found: NDArray[Any] = value.view(torch.int16).numpy().view(np.uint16) if narrow else value.numpy()
    return found


def _there(value: Tensor | None, closed: bool) -> Tensor:
    if closed:
        raise ClosedError("this session was closed: open a new one")
    if value is None:
        raise UsageError("no latents are loaded: call load() first")
    return value
