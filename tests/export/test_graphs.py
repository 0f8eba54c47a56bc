"""Every exported graph computes what its torch module does, at other sizes than it was traced with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from swiftvideo.export.bundle import export_backbone
from swiftvideo.export.graphs import (
    ExportError,
    Graph,
    backbone_graphs,
    decode_graphs,
    export_graph,
    text_graph,
)
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.verify_inputs import cases, segment_tables
from swiftvideo.export.weights import WEIGHTS_KEY, WeightFile, blank, restore
from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.manifest import GRAPHS
from swiftvideo.runtime.positions import time_tables

from . import small

CHECKPOINT = small.checkpoint()
GEOMETRY = CHECKPOINT.geometry()


def module_of(name: str) -> Graph:
    if name == "text_encoder":
        return text_graph(CHECKPOINT.text_encoder, GEOMETRY.text_len)
    made = decode_graphs(CHECKPOINT.vae, GEOMETRY)
    if not name.startswith("decode"):
        made = backbone_graphs(CHECKPOINT.backbone, GEOMETRY, CHECKPOINT.schedule)
    return next(graph for graph in made if graph.name == name)


def opened(bundle: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])


def same(made: list[np.ndarray], expected: list[Tensor], what: str) -> None:
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.shape == tuple(theirs.shape), what
        if ours.dtype == np.uint8:
            assert np.abs(ours.astype(int) - theirs.numpy().astype(int)).max() <= 1, what
        else:
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4, err_msg=what)


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_equals_its_module(small_bundle: Path, name: str) -> None:
    graph, session = module_of(name), opened(small_bundle, name)
    for label, feeds in cases(graph, GEOMETRY, torch.Generator().manual_seed(3)):
        made = session.run(graph.outputs, {key: value.contiguous().numpy() for key, value in feeds.items()})
        same(made, graph.run(feeds), label)


@pytest.mark.parametrize("frames", [3, 4, 7, 12])
def test_denoise_takes_any_number_of_frames_and_rows(small_bundle: Path, frames: int) -> None:
    graph, session, g = module_of("denoise"), opened(small_bundle, "denoise"), GEOMETRY
    generator = torch.Generator().manual_seed(frames)
    rows = g.rows + 5  # not what it was traced with
    table = [
        (start + 5 if start >= g.rows else start, n) for start, n in segment_tables(g, frames)["cut frame"]
    ]
    segments = torch.zeros(1, 6, 2, dtype=torch.int32)
    segments[0, : len(table)] = torch.tensor(table)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = (1, frames, g.latent_channels, g.latent_height, g.latent_width)
    cache, cross = (g.layers, 1, rows, g.heads, g.head_dim), (g.layers, 1, g.text_len, g.heads, g.head_dim)
    cos, sin = (torch.from_numpy(part)[None] for part in time_tables(9, frames, g.time_pairs))
    feeds = {
        "latents": normal(*latents),
        "noise": normal(*latents),
        "step": torch.tensor(2),
        "time_cos": cos,
        "time_sin": sin,
        "segments": segments,
        "cache_k": normal(*cache),
        "cache_v": normal(*cache),
        "cross_k": normal(*cross),
        "cross_v": normal(*cross),
    }
    made = session.run(graph.outputs, {key: value.numpy() for key, value in feeds.items()})
    same(made, graph.run(feeds), f"{frames} frames")


@pytest.mark.parametrize("name", GRAPHS)
def test_files_are_valid_and_tell_nothing_of_this_machine(small_bundle: Path, name: str) -> None:
    path = small_bundle / "onnx" / f"{name}.onnx"
    onnx.checker.check_model(path)
    model = onnx.load(path, load_external_data=False)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    swift = {node.op_type for node in model.graph.node if node.domain == "swift"}
    assert swift == {function.name for function in model.functions}


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "inject"])
def test_recorded_weights_are_the_checkpoints(small_bundle: Path, name: str) -> None:
    graph, fresh = module_of(name), dataclasses.replace(module_of(name))
    model = onnx.load(small_bundle / "onnx" / f"{name}.onnx", load_external_data=False)
    recorded = json.loads({entry.key: entry.value for entry in model.metadata_props}[WEIGHTS_KEY])
    expected = {key: value.clone() for key, value in graph.module.state_dict().items()}
    assert recorded
    if name == "denoise":
        assert len(recorded) >= 2 * 20 + 6  # all of the two blocks but the cross-attention's keys and values
    try:
        blank(fresh.module)
        restore(
            fresh.module, model, name, lambda file: memoryview((small_bundle / "onnx" / file).read_bytes())
        )
        computed = dict(fresh.module.named_buffers())
        for parameter, value in fresh.module.state_dict().items():
            if parameter in recorded and parameter in computed:  # may round otherwise on other threads
                torch.testing.assert_close(value, expected[parameter], rtol=0, atol=1e-6)
            elif parameter in recorded:
                assert torch.equal(value, expected[parameter]), parameter
            else:
                assert parameter in computed or value.isnan().all(), parameter
    finally:  # the module is the checkpoint's
        graph.module.load_state_dict(expected, assign=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decoder_s_weights_are_recorded_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Narrow ones too: the exporter would compute with constants so small."""
    decoder = small.checkpoint().vae.to(dtype)
    graph = next(graph for graph in decode_graphs(decoder, GEOMETRY) if graph.name == "decode")
    model = onnx.load(export_graph(graph, tmp_path), load_external_data=False)
    recorded = json.loads({entry.key: entry.value for entry in model.metadata_props}[WEIGHTS_KEY])
    assert set(recorded) >= {f"decoder.{name}" for name, _ in decoder.named_parameters()}


def test_wide_convolutions_of_float32_are_in_two_dimensions(small_bundle: Path) -> None:
    """ONNX Runtime is faster at those; narrow ones stay whole."""
    model = onnx.load(small_bundle / "onnx" / "decode.onnx", load_external_data=False)
    widths = {tensor.name: tensor.dims[1] for tensor in model.graph.initializer if len(tensor.dims) > 1}
    flat, whole = 0, []
    for node in model.graph.node:
        kernel = next((list(a.ints) for a in node.attribute if a.name == "kernel_shape"), None)
        flat += kernel == [3, 3]
        if kernel == [3, 3, 3]:
            whole.append(widths[node.input[1]])
    assert flat > 10 and whole and set(whole) == {8}


def test_schedule_and_geometry_must_agree() -> None:
    with pytest.raises(SettingsError, match=r"2 steps, geometry\.steps is 4"):
        next(backbone_graphs(CHECKPOINT.backbone, GEOMETRY, Schedule(indices=(1000, 500))))


def test_other_outputs_than_asked_for(tmp_path: Path) -> None:
    graph = dataclasses.replace(module_of("inject"), outputs=["bridge"])
    with pytest.raises(ExportError, match="inject: inputs and outputs are"):
        export_graph(graph, tmp_path)


def test_a_backbone_alone_has_three_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("swiftvideo.export.bundle.export_graph", lambda graph, *_: written.append(graph.name))
    manifest = export_backbone(CHECKPOINT.backbone, GEOMETRY, CHECKPOINT.schedule, tmp_path / "b")
    assert written == ["condition", "denoise", "inject"]
    assert manifest.geometry == GEOMETRY


def test_equal_tensors_are_written_once(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "some.data")
    first = torch.randn(40, 3)
    assert file.add(first) == (0, 480)
    assert file.add(torch.arange(100.0)) == (512, 400)
    assert file.add(first.t().contiguous().t()) == (0, 480)
    large = torch.randn(2000)
    assert file.add(large) == (4096, 8000)
    content = (tmp_path / "some.data").read_bytes()
    assert len(content) == 4096 + 8000
    assert content[4096:] == large.numpy().tobytes()
