"""Bytes that the layers of full-size plans read and write, by TensorRT-RTX's own report. No GPU is needed.

    python -m tests.bench.plan_bytes [--target rtx:sm89] [--json FILE]

For one session and a chunk of 12 frames at 832x480 in bfloat16: decoding it, and one layer of one forward, which is
what a plan of three layers has more than one of two. Between the products and convolutions ("gemm", "correlation",
"runtime_fusion") are the kernels that TensorRT generates ("kgen"): what they move is what a graph's form decides.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from rich.console import Console
from rich.table import Table

from swiftvideo.export.graphs import backbone_graphs, decode_graphs, export_graph
from swiftvideo.export.models.backbone import PRESETS, CausalWanModel
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.models.vae import StreamingDecoder
from swiftvideo.export.tensorrt import check_buildable, run_builder, write_kernels
from swiftvideo.runtime.geometry import Geometry
from swiftvideo.runtime.plugins.kernel import OPS
from swiftvideo.sdk.machine import describe

CONFIG = PRESETS["wan2.1-t2v-1.3b"]
SIZE = {"latent_channels": 16, "latent_height": 60, "latent_width": 104}
WIDTHS = {"BFloat16": 2, "Float": 4, "UInt8": 1, "Int32": 4, "Int64": 8, "Bool": 1}
_TENSOR = re.compile(r"(\w+)\[([\d,]*)\]")


def tensor_bytes(text: str) -> int:
    """Bytes of a tensor such as "BFloat16[1,96,12]". Raises ValueError where its shape is not known."""
    match = _TENSOR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no dtype with a shape of known sizes")
    return WIDTHS[match[1]] * math.prod(int(size) for size in match[2].split(",") if size)


def moved(layers: list[dict[str, Any]]) -> Counter[str]:
    """Bytes read and written, by kind of layer; a plugin's are left out, whose tables say what it reads."""
    total: Counter[str] = Counter()
    for layer in layers:
        if not layer["plugin"]:
            total[layer["type"]] += sum(map(tensor_bytes, layer["inputs"] + layer["outputs"]))
    return total


def geometry(layers: int) -> Geometry:
    """The full-size model's, with so many layers."""
    heads = CONFIG.num_heads
    text = {"text_len": CONFIG.text_len, "text_dim": CONFIG.text_dim}
    return Geometry(layers=layers, heads=heads, head_dim=CONFIG.dim // heads, **SIZE, **text)


def graphs(folder: Path) -> Iterator[tuple[str, Path, Geometry]]:
    """What is built: a name, the ONNX file and the geometry of each."""
    g = geometry(2)
    decoder = StreamingDecoder(AutoencoderKLWan()).to(torch.bfloat16)
    for graph in decode_graphs(decoder, g):
        if graph.name == "decode":
            yield "decode", export_graph(graph, folder), g
    for layers in (2, 3):
        g, place = geometry(layers), folder / str(layers)
        place.mkdir()
        model = CausalWanModel(replace(CONFIG, num_layers=layers)).to(torch.bfloat16)
        for graph in backbone_graphs(model, g, Schedule()):
            if graph.name == "denoise":
                yield f"denoise, {layers} layers", export_graph(graph, place), g


def layers_of(graph: Path, g: Geometry, target: str, work: Path) -> list[dict[str, Any]]:
    """Layers of the plan for a chunk of one session."""
    wanted = check_buildable(target, "bf16", g.head_dim)
    write_kernels(OPS, wanted, "bf16", g.head_dim, work)
    sizes = {axis: (size,) * 3 for axis, size in {"B": 1, "F": g.chunk, "R": g.rows}.items()}
    layers: list[dict[str, Any]] = run_builder(
        graph.stem, graph, work / "plan", wanted, sizes, plugins=True, work=work
    )["layers"]
    return layers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="rtx:sm89")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, graph, g in graphs(Path(place)):
            found[name] = moved(layers_of(graph, g, options.target, Path(place)))
    found["denoise, a layer"] = found["denoise, 3 layers"] - found["denoise, 2 layers"]
    kinds = sorted({kind for total in found.values() for kind, size in total.items() if size})
    table = Table("MB", *kinds, title=f"a chunk of one session, 832x480, bf16, {options.target}")
    for name, total in found.items():
        table.add_row(name, *(f"{total[kind] / 1e6:.0f}" for kind in kinds))
    Console().print(table)
    if options.json:
        result = {**describe(), "target": options.target, "bytes": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
