"""The graphs of a bundle: thin modules around the models, and their export to ONNX.

Names and shapes of inputs and outputs are those of docs/architecture.md. Symbols: B sessions in a batch, F latent
frames, T text length, L layers, R cache rows, P tokens a frame, n heads, d head width; B, F, R and T stay dynamic.
Sigmas and time embeddings of all passes are constants of `denoise`, chosen by its input `step`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.geometry import Geometry

from . import onnx_ops
from .models.backbone import CausalWanModel
from .models.schedule import Schedule
from .models.text import TextEncoder
from .models.vae import StreamingDecoder

LAST_SIGMA = 0.0
"""What the last denoising step and the context pass re-noise to: x0 itself."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A module ready to be traced.

    inputs: example tensors in the order of `forward`, by name. dynamic: per input, names of dynamic axes.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor | list[Tensor]]
    dynamic: dict[str, Any]
    outputs: list[str]


class Denoise(nn.Module):
    """One pass of the backbone over F frames: x0, the re-noised latents and the fresh K and V."""

    e: Tensor
    e0: Tensor
    sigmas: Tensor
    next_sigmas: Tensor
    space_cos: Tensor
    space_sin: Tensor

    def __init__(self, model: CausalWanModel, geometry: Geometry, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.scale = geometry.head_dim**-0.5
        with torch.no_grad():
            e, e0 = model.time_embed(torch.tensor(schedule.passes)[None])
        cos, sin = model.space_rope(
            geometry.latent_height // geometry.patch[1], geometry.latent_width // geometry.patch[2]
        )
        sigmas = torch.tensor(schedule.pass_sigmas)
        following = torch.cat((sigmas[1:-1], torch.full((2,), LAST_SIGMA)))
        tables = {"e": e[0], "e0": e0[0], "sigmas": sigmas, "next_sigmas": following}
        for name, value in (tables | {"space_cos": cos, "space_sin": sin}).items():
            self.register_buffer(name, value, persistent=False)

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        step: Tensor,
        time_cos: Tensor,
        time_sin: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        segments: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the module's table; latents and noise float32 [B,F,C,h,w], step int64 []."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return onnx_ops.window_attention_node(q, k, v, cache_k, cache_v, segments, layer, self.scale)

        row = step.reshape(1)

        def pick(table: Tensor) -> Tensor:
            return torch.index_select(table, 0, row)

        flow, fresh_k, fresh_v = self.model(
            latents,
            pick(self.e).unsqueeze(1),
            pick(self.e0).unsqueeze(1),
            time_cos,
            time_sin,
            cross_k,
            cross_v,
            attend=attend,
            space=(self.space_cos, self.space_sin),
        )
        x0 = latents - pick(self.sigmas) * flow.float()
        sigma = pick(self.next_sigmas)
        return x0, (1 - sigma) * x0 + sigma * noise, fresh_k, fresh_v


class Condition(nn.Module):
    """Cross-attention's K and V of a prompt for every layer, and its signature."""

    def __init__(self, model: CausalWanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """embeds [B,T,text_dim] -> cross_k, cross_v [L,B,text_len,n,d], signature float32 [B,D]."""
        context = self.model.embed_text(embeds)
        cross_k, cross_v = self.model.cross_kv(context)
        return cross_k, cross_v, self.model.signature(embeds, context)


class Inject(nn.Module):
    """The semantic injection as one node."""

    def forward(
        self,
        cache_v: Tensor,
        spans: Tensor,
        old_signature: Tensor,
        new_signature: Tensor,
        rho: Tensor,
        mix: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `ops.semantic_injection`."""
        return onnx_ops.injection_node(cache_v, spans, old_signature, new_signature, rho, mix)


class Decode(nn.Module):
    """The VAE decoder over later frames: frames and the new caches."""

    def __init__(self, decoder: StreamingDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """See `StreamingDecoder.decode`."""
        return self.decoder.decode(latents, caches)


class DecodeFirst(Decode):
    """The VAE decoder over a video's first latent frame."""

    def forward(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        """See `StreamingDecoder.decode_first`."""
        return self.decoder.decode_first(latents)


def backbone_graphs(model: CausalWanModel, geometry: Geometry, schedule: Schedule) -> Iterator[Graph]:
    """condition, denoise and inject of a backbone; K and V have the dtype of its weights."""
    if len(schedule.steps) != geometry.steps:
        raise SettingsError(
            f"the schedule has {len(schedule.steps)} steps, geometry.steps is {geometry.steps}: make them agree"
        )
    g, dtype = geometry, model.dtype
    batch, frames, text = 2, g.chunk, g.text_len
    b, r = Dim("B", min=1, max=64), Dim("R", min=1, max=1 << 20)
    f = Dim("F", min=1, max=1024)

    def normal(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=like)

    cache = normal(g.layers, batch, g.rows, g.heads, g.head_dim, like=dtype)
    cross = normal(g.layers, batch, text, g.heads, g.head_dim, like=dtype)
    yield Graph(
        "condition",
        Condition(model),
        {"embeds": normal(batch, text, g.text_dim, like=dtype)},
        {"embeds": {0: b}},
        ["cross_k", "cross_v", "signature"],
    )
    latents = normal(batch, frames, g.latent_channels, g.latent_height, g.latent_width)
    table = normal(batch, frames, g.time_pairs)
    yield Graph(
        "denoise",
        Denoise(model, geometry, schedule),
        {
            "latents": latents,
            "noise": latents.clone(),
            "step": torch.tensor(0),
            "time_cos": table,
            "time_sin": table.clone(),
            "cache_k": cache,
            "cache_v": cache.clone(),
            "segments": torch.zeros(batch, 6, 2, dtype=torch.int32),
            "cross_k": cross,
            "cross_v": cross.clone(),
        },
        {
            **dict.fromkeys(("latents", "noise", "time_cos", "time_sin"), {0: b, 1: f}),
            "step": {},
            **dict.fromkeys(("cache_k", "cache_v"), {1: b, 2: r}),
            "segments": {0: b},
            **dict.fromkeys(("cross_k", "cross_v"), {1: b}),
        },
        ["x0", "next_latents", "fresh_k", "fresh_v"],
    )
    signature, scalar = normal(batch, g.dim), normal(batch)
    yield Graph(
        "inject",
        Inject(),
        {
            "cache_v": cache,
            "spans": torch.zeros(batch, 5, 3, 2, dtype=torch.int32),
            "old_signature": signature,
            "new_signature": signature.clone(),
            "rho": scalar,
            "mix": scalar.clone(),
        },
        {
            "cache_v": {1: b, 2: r},
            **dict.fromkeys(("spans", "old_signature", "new_signature", "rho", "mix"), {0: b}),
        },
        ["bridge", "anchor"],
    )


def text_graph(encoder: TextEncoder, text_len: int) -> Graph:
    """text_encoder: prompts are padded to text_len."""
    ids = torch.ones(2, text_len, dtype=torch.int64)
    b = Dim("B", min=1, max=64)
    return Graph(
        "text_encoder",
        encoder,
        {"ids": ids, "mask": ids.clone()},
        {"ids": {0: b}, "mask": {0: b}},
        ["embeds"],
    )


def decode_graphs(decoder: StreamingDecoder, geometry: Geometry) -> Iterator[Graph]:
    """decode_first and decode; caches are inputs vae_cache_i and outputs new_vae_cache_i."""
    g = geometry
    b, f = Dim("B", min=1, max=64), Dim("F", min=1, max=1024)
    shapes = decoder.cache_shapes(2, g.latent_height, g.latent_width)
    new = [f"new_vae_cache_{index}" for index in range(len(shapes))]
    latents = torch.zeros(2, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    yield Graph(
        "decode_first",
        DecodeFirst(decoder),
        {"latents": latents[:, :1].contiguous()},
        {"latents": {0: b}},
        ["frames", *new],
    )
    caches = [torch.zeros(shape, dtype=decoder.dtype) for shape in shapes]
    yield Graph(
        "decode",
        Decode(decoder),
        {"latents": latents, "vae_cache": caches},
        {"latents": {0: b, 1: f}, "vae_cache": [{0: b} for _ in shapes]},
        ["frames", *new],
    )


def input_names(graph: Graph) -> list[str]:
    """Names of the ONNX inputs: a list of tensors becomes name_0, name_1, ..."""
    names = []
    for name, value in graph.inputs.items():
        names += [f"{name}_{i}" for i in range(len(value))] if isinstance(value, list) else [name]
    return names


def export_graph(graph: Graph, folder: Path, progress: Callable[[str], None] | None = None) -> list[str]:
    """Write folder/<name>.onnx and, where it has weights, <name>.onnx.data; return the files' names.

    The ONNX checker runs on the file. Raises what torch.onnx.export raises where a module cannot be traced.
    """
    if progress:
        progress(graph.name)
    path = folder / f"{graph.name}.onnx"
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            input_names=input_names(graph),
            output_names=graph.outputs,
            dynamic_shapes=tuple(graph.dynamic[name] for name in graph.inputs),
            opset_version=onnx_ops.OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=True)
    del program
    model = onnx.load(path, load_external_data=False)
    names = [item.name for item in model.graph.output]
    assert names == graph.outputs, f"{graph.name}: outputs are {names}, not {graph.outputs}"
    onnx_ops.attach(model)
    del model.graph.value_info[:]
    onnx.save(model, path)
    onnx.checker.check_model(path)
    data = path.with_name(path.name + ".data")
    return [path.name] + ([data.name] if data.is_file() else [])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on progress and deprecations off the screen; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def flat_inputs(values: Sequence[Tensor | list[Tensor]]) -> list[Tensor]:
    """Tensors of a graph's inputs in the order of `input_names`."""
    flat: list[Tensor] = []
    for value in values:
        flat += value if isinstance(value, list) else [value]
    return flat
