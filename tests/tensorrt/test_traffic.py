"""What the kernels of bfloat16 plans write down, by the builder's own report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from swiftvideo.export.graphs import Graph, backbone_graphs, decode_graphs, export_graph
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.models.vae import StreamingDecoder
from swiftvideo.runtime.geometry import Geometry
from tests.bench.plan_bytes import layers_of, moved, tensor_bytes
from tests.export.small import BACKBONE, checkpoint

from .bundles import HEAD

GEOMETRY = Geometry(
    layers=2,
    heads=2,
    head_dim=HEAD,
    latent_channels=16,
    latent_height=4,
    latent_width=6,
    text_len=BACKBONE.text_len,
    text_dim=BACKBONE.text_dim,
)
TOKENS = GEOMETRY.chunk * GEOMETRY.frame_tokens


def written(graphs: Iterable[Graph], name: str, folder: Path) -> set[str]:
    """Tensors of float32 that a plan for a chunk writes."""
    path = next(export_graph(graph, folder) for graph in graphs if graph.name == name)
    layers = layers_of(path, GEOMETRY, "rtx:sm89", folder)
    return {tensor for layer in layers for tensor in layer["outputs"] if tensor.startswith("Float[")}


def test_norms_of_the_decoder_write_one_float_a_pixel(rtx: None, tmp_path: Path) -> None:
    vae = checkpoint().vae
    vae.decoder.mid_block.attentions[0] = None  # diffusers' own, with a norm of its own
    decoder: StreamingDecoder = vae.to(torch.bfloat16)
    found = written(decode_graphs(decoder, GEOMETRY), "decode", tmp_path)
    assert found and all(re.match(r"Float\[1,1,", tensor) for tensor in found)


def test_norms_of_queries_and_keys_write_one_float_a_token(rtx: None, tmp_path: Path) -> None:
    config = dataclasses.replace(BACKBONE, dim=2 * HEAD)
    model = CausalWanModel(config).eval().requires_grad_(False).to(torch.bfloat16)
    found = written(backbone_graphs(model, GEOMETRY, Schedule()), "denoise", tmp_path)
    assert f"Float[1,{TOKENS},1]" in found
    assert not {f"Float[1,{TOKENS},{config.dim}]", f"Float[{TOKENS},{config.dim}]"} & found


def test_bytes_are_counted_by_kind_of_layer() -> None:
    kernel = {
        "type": "kgen",
        "plugin": False,
        "inputs": ["BFloat16[2,3]"],
        "outputs": ["Float[2,1]", "Int64[]"],
    }
    plugin = {"type": "custom_layer", "plugin": True, "inputs": ["Float[-1]"], "outputs": []}
    assert moved([kernel, kernel, plugin]) == {"kgen": 2 * (12 + 8 + 8)}
    with pytest.raises(ValueError, match="sizes"):
        tensor_bytes("Float[1,-1]")
