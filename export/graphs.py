"""The graphs of a bundle: thin modules around the models, and their export to ONNX.

Names and shapes of inputs and outputs are those of docs/export.md. Symbols: B sessions in a batch, F latent frames, T
text length, L layers, R cache rows, P tokens a frame, n heads, d head width. B, F and R stay dynamic; T is the model's
text_len, to which prompts are padded. Sigmas and time embeddings of all passes are constants of `denoise`, chosen by
its input `step`.

Called in Python, the modules compute what their graphs do, with the torch reference of the two ops (ops.py).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

from swiftvideo.runtime.errors import SettingsError, SwiftVideoError
from swiftvideo.runtime.geometry import Geometry

from . import onnx_ops, weights
from .models.backbone import CausalWanModel
from .models.schedule import Schedule
from .models.text import TextEncoder
from .models.vae import StreamingDecoder

LAST_SIGMA = 0.0
"""What the last denoising step and the context pass re-noise to: x0 itself."""


REARRANGING = {"Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity"}
"""Ops that may be applied to parameters at export; anything else would make them unrecognisable."""


class ExportError(SwiftVideoError):
    """The exporter made a graph that this package cannot use."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A module ready to be traced.

    inputs: example tensors in the order of `forward`, by name. dynamic: per input, names of dynamic axes. config: what
    the module was built from, as JSON has it. data: stem of the weights' file, which graphs may share.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor | list[Tensor]]
    dynamic: dict[str, Any]
    outputs: list[str]
    config: dict[str, Any]
    data: str

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs of the module in the order of `outputs`; feeds have the names of `input_names`."""
        arguments: list[Any] = []
        for name, value in self.inputs.items():
            many = isinstance(value, list)
            arguments.append([feeds[f"{name}_{i}"] for i in range(len(value))] if many else feeds[name])
        return _flat(self.module(*arguments))


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _flat(item)]


class Denoise(nn.Module):
    """One pass of the backbone over F frames: x0, the re-noised latents and the fresh K and V."""

    e: Tensor
    e0: Tensor
    sigmas: Tensor
    next_sigmas: Tensor
    space_cos: Tensor
    space_sin: Tensor
    fresh: tuple[Tensor, Tensor] | None = None
    """Where fresh K and V go, for an engine that keeps them at one address."""

    def __init__(self, model: CausalWanModel, geometry: Geometry, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.scale = geometry.head_dim**-0.5
        with torch.no_grad():
            passes = torch.tensor(schedule.passes, device=model.patch_embedding.weight.device)
            e, e0 = model.time_embed(passes[None])
        cos, sin = model.space_rope(
            geometry.latent_height // geometry.patch[1], geometry.latent_width // geometry.patch[2]
        )
        sigmas = torch.tensor(schedule.pass_sigmas)
        following = torch.cat((sigmas[1:-1], torch.full((2,), LAST_SIGMA)))
        for name, value in (
            ("e", e[0]),
            ("e0", e0[0]),
        ):  # part of the state: graphs have no time MLP to restore
            self.register_buffer(name, value)
        tables = {"sigmas": sigmas, "next_sigmas": following, "space_cos": cos, "space_sin": sin}
        for name, value in tables.items():
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
            return self.attention(q, k, v, cache_k, cache_v, segments, layer, self.scale)

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
            fresh=self.fresh,
        )
        x0 = latents - pick(self.sigmas) * flow.float()
        sigma = pick(self.next_sigmas)
        return x0, (1 - sigma) * x0 + sigma * noise, fresh_k, fresh_v

    def attention(self, *arguments: Any) -> Tensor:
        """`onnx_ops.window_attention`; an engine may put its own in this place."""
        return onnx_ops.window_attention(*arguments)


class Condition(nn.Module):
    """Cross-attention's K and V of a prompt for every layer, and its signature."""

    def __init__(self, model: CausalWanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """embeds [B,text_len,text_dim] -> cross_k, cross_v [L,B,text_len,n,d], signature float32 [B,D]."""
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
        return onnx_ops.injection(cache_v, spans, old_signature, new_signature, rho, mix)


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
    config = {"backbone": asdict(model.config)}
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
        config,
        "condition",
    )
    latents = normal(batch, frames, g.latent_channels, g.latent_height, g.latent_width)
    table = normal(batch, frames, g.time_pairs)
    yield Graph(
        "denoise",
        Denoise(model, geometry, schedule),
        {
            "latents": latents,
            "noise": torch.zeros_like(latents),
            "step": torch.tensor(0),
            "time_cos": table,
            "time_sin": torch.zeros_like(table),
            "cache_k": cache,
            "cache_v": torch.zeros_like(cache),
            "segments": torch.zeros(batch, 6, 2, dtype=torch.int32),
            "cross_k": cross,
            "cross_v": torch.zeros_like(cross),
        },
        {
            **{key: {0: b, 1: f} for key in ("latents", "noise", "time_cos", "time_sin")},
            "step": {},
            **{key: {1: b, 2: r} for key in ("cache_k", "cache_v")},
            "segments": {0: b},
            **{key: {1: b} for key in ("cross_k", "cross_v")},
        },
        ["x0", "next_latents", "fresh_k", "fresh_v"],
        config,
        "denoise",
    )
    signature, scalar = normal(batch, g.dim), normal(batch)
    yield Graph(
        "inject",
        Inject(),
        {
            "cache_v": cache,
            "spans": torch.zeros(batch, 5, 3, 2, dtype=torch.int32),
            "old_signature": signature,
            "new_signature": torch.zeros_like(signature),
            "rho": scalar,
            "mix": torch.zeros_like(scalar),
        },
        {
            "cache_v": {1: b, 2: r},
            **{key: {0: b} for key in ("spans", "old_signature", "new_signature", "rho", "mix")},
        },
        ["bridge", "anchor"],
        {},
        "inject",
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
        {"text_encoder": encoder.encoder.config.to_diff_dict()},
        "text_encoder",
    )


def decode_graphs(decoder: StreamingDecoder, geometry: Geometry) -> Iterator[Graph]:
    """decode_first and decode; caches are inputs vae_cache_i and outputs new_vae_cache_i."""
    g = geometry
    b, f = Dim("B", min=1, max=64), Dim("F", min=1, max=1024)
    shapes = decoder.cache_shapes(2, g.latent_height, g.latent_width)
    new = [f"new_vae_cache_{index}" for index in range(len(shapes))]
    config = {"vae": decoder.config}
    latents = torch.zeros(2, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    yield Graph(
        "decode_first",
        DecodeFirst(decoder),
        {"latents": latents[:, :1].contiguous()},
        {"latents": {0: b}},
        ["frames", *new],
        config,
        "decoder",
    )
    caches = [torch.zeros(shape, dtype=decoder.dtype) for shape in shapes]
    yield Graph(
        "decode",
        Decode(decoder),
        {"latents": latents, "vae_cache": caches},
        {"latents": {0: b, 1: f}, "vae_cache": [{0: b} for _ in shapes]},
        ["frames", *new],
        config,
        "decoder",
    )


def input_names(graph: Graph) -> list[str]:
    """Names of the ONNX inputs: a list of tensors becomes name_0, name_1, ..."""
    names = []
    for name, value in graph.inputs.items():
        names += [f"{name}_{i}" for i in range(len(value))] if isinstance(value, list) else [name]
    return names


def export_graph(graph: Graph, folder: Path, file: weights.WeightFile | None = None) -> Path:
    """Write folder/<name>.onnx, and its weights into `file` (folder/<data>.data by default); return the graph's path.

    The ONNX checker runs on the file. Raises what torch.onnx.export raises where a module cannot be traced, and
    ExportError where the result has other outputs than were asked for.
    """
    path = folder / f"{graph.name}.onnx"
    module = graph.module.eval()
    names = input_names(graph)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            tuple(graph.inputs.values()),
            input_names=names,
            output_names=graph.outputs,
            dynamic_shapes=tuple(graph.dynamic[name] for name in graph.inputs),
            opset_version=onnx_ops.OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise ExportError(
                f"torch.onnx.export gave no program for {graph.name}: use another version of torch"
            )
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        optimizer.optimize_ir(program.model, should_fold=lambda node: _folds(node, parameters))
    model = program.model
    seen = [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    if seen != [names, graph.outputs]:
        raise ExportError(
            f"{graph.name}: inputs and outputs are {seen} instead of {[names, graph.outputs]}: "
            "use another version of torch"
        )
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of the exporting machine
    weights.store(model, module, graph.config, file or weights.WeightFile(folder / f"{graph.data}.data"))
    proto = ir.to_proto(model)
    del program, model
    del proto.graph.value_info[:]
    onnx_ops.attach(proto)
    onnx.save(proto, path)
    onnx.checker.check_model(path)
    return path


def _folds(node: ir.Node, parameters: set[str]) -> bool | None:
    """Whether a node of constants may be computed at export: None leaves it to the optimizer, False forbids it.

    What a rearranged parameter becomes is one as well, and joins `parameters`.
    """
    if not any(value is not None and value.name in parameters for value in node.inputs):
        return None
    if node.op_type not in REARRANGING:
        return False
    parameters.update(value.name for value in node.outputs if value.name)
    return None


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
