"""Work counted from graphs, beside PyTorch's own counter on the models in Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swiftvideo.export.flops import BundleWork, Work, count
from swiftvideo.export.restore import engine_of
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime.errors import BundleError, BundleMissingError
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.positions import time_tables

WITHIN = 0.01


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Manifest.load(tiny_bundle)


@pytest.fixture(scope="module")
def engine(manifest: Manifest) -> TorchEngine:
    torch.set_num_threads(1)
    return engine_of(manifest, torch.device("cpu"))


def flop(work: Any, *arguments: Any) -> int:
    """What PyTorch counts while `work` runs; of its attentions it counts the plain one."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        work(*arguments)
    return int(counter.get_total_flops())


def latents(engine: TorchEngine, frames: int) -> torch.Tensor:
    g = engine.geometry
    return torch.zeros(1, frames, g.latent_channels, g.latent_height, g.latent_width)


@pytest.mark.parametrize("window", [3, 7, 9, 12])
def test_denoise_at_a_window(manifest: Manifest, engine: TorchEngine, window: int) -> None:
    """A chunk that sees the sink and the newest frames, itself included."""
    g = engine.geometry
    rest = window * g.frame_tokens - g.chunk * g.frame_tokens
    segments = torch.zeros(6, 2, dtype=torch.int32)
    segments[0] = torch.tensor([g.memory_rows, rest])
    segments[1] = torch.tensor([g.rows, g.chunk * g.frame_tokens])
    session = engine.open()
    session.load(latents(engine, g.chunk).numpy())
    prompt = engine.condition(torch.ones(1, g.text_len, g.text_dim).numpy())
    theirs = flop(session.denoise, 0, None, *time_tables(0, g.chunk, g.time_pairs), segments.numpy(), prompt)
    ours = BundleWork(manifest).denoise(g.chunk, window * g.frame_tokens).flop
    assert ours == pytest.approx(theirs, rel=WITHIN)


def test_a_recache_counts_all_its_frames(manifest: Manifest, engine: TorchEngine) -> None:
    g, work = engine.geometry, BundleWork(manifest)
    keys = g.window * g.frame_tokens
    one, many = work.denoise(g.chunk, keys), work.denoise(g.window, keys)
    assert many.flop == pytest.approx(one.flop * g.window / g.chunk, rel=1e-9)
    assert one.bytes < many.bytes < one.bytes * g.window / g.chunk  # the weights are read once


def test_decoding(manifest: Manifest, engine: TorchEngine) -> None:
    decoder, work, chunk = engine.decoder, BundleWork(manifest), engine.geometry.chunk
    assert decoder is not None
    assert work.decode_first().flop == pytest.approx(
        flop(decoder.decode_first, latents(engine, 1)), rel=WITHIN
    )
    _, caches = decoder.decode_first(latents(engine, 1))
    for frames in (chunk - 1, chunk):
        theirs = flop(decoder.decode, latents(engine, frames), caches)
        assert work.decode(frames).flop == pytest.approx(theirs, rel=WITHIN)


def test_a_prompt(manifest: Manifest, engine: TorchEngine) -> None:
    g, work = engine.geometry, BundleWork(manifest)
    ids = torch.ones(1, g.text_len, dtype=torch.int64)
    encoder: Any = engine.text_encoder
    assert work.text_encoder().flop == pytest.approx(flop(encoder, ids, ids), rel=WITHIN)
    embeds = torch.ones(1, g.text_len, g.text_dim)
    context = engine.model.embed_text(embeds)
    theirs = flop(engine.model.embed_text, embeds) + flop(engine.model.cross_kv, context)
    assert work.condition().flop == pytest.approx(theirs, rel=WITHIN)


def test_bytes_are_weights_keys_inputs_and_outputs(manifest: Manifest, engine: TorchEngine) -> None:
    g, work = engine.geometry, BundleWork(manifest)
    element = engine.model.patch_embedding.weight.element_size()
    row = 2 * g.layers * g.dim * element
    tokens = g.chunk * g.frame_tokens
    a, b = work.denoise(g.chunk, 10), work.denoise(g.chunk, 110)
    assert b.bytes - a.bytes == 100 * row
    unused = (
        "text_embedding",
        "time_embedding",
        "time_projection",
        "cross_attn.k",
        "cross_attn.v",
        "cross_attn.norm_k",
    )
    weights = sum(
        value.numel() * element
        for name, value in engine.model.named_parameters()
        if not any(part in name for part in unused)
    )
    least = weights + (10 + tokens) * row + 2 * g.layers * g.text_len * g.dim * element
    assert least < a.bytes < 1.1 * least + 8 * latents(engine, g.chunk).numel() * 4


def test_twice_the_batch_is_twice_the_work(manifest: Manifest) -> None:
    work, frames, keys = BundleWork(manifest), manifest.geometry.chunk, 100
    assert work.denoise(frames, keys, 2).flop == 2 * work.denoise(frames, keys).flop
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)


def test_gemm_and_grouped_convolutions() -> None:
    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["a", "b"], ["c"], transA=1),
            helper.make_node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
        ],
        "g",
        [value("a", 5, "B"), value("b", 5, 7), value("x", "B", 4, 8, 8), value("w", 6, 2, 3, 3)],
        [value("c", "B", 7), value("y", "B", 6, 4, 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made = count(model, {"B": 3})
    assert made.fixed.flop == 2 * 3 * 7 * 5 + 2 * (3 * 6 * 4 * 4) * (2 * 3 * 3)
    assert made.per_key == Work(0, 0)


def test_what_cannot_be_counted(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError, match=r"lists no onnx/denoise\.onnx"):
        BundleWork(dataclasses.replace(manifest, files={})).denoise(3, 10)
    model = onnx.load_model_from_string(bytes(manifest.read_file("onnx/denoise.onnx")))
    with pytest.raises(BundleError, match="an axis F, known are"):
        count(model, {"B": 1}, "denoise")
