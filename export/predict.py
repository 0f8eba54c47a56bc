"""What a model must cost before it is run: work of its graphs, and the floors that follow from a machine's limits.

    python -m swiftvideo.export.predict wan2.1-t2v-1.3b --height 480 --width 832 --tflops 788 --terabytes 4.3

The graphs are exported without weights (every parameter is one repeated value), so no GPU and little memory is needed;
all layers are there, and what is counted is what a bundle of the model has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.geometry import Geometry, PolicySettings
from swiftvideo.runtime.manifest import Manifest, Source, measure_files

from .bundle import NO_HASH, schedule_info
from .flops import BundleWork, Work
from .graphs import backbone_graphs, decode_graphs, export_graph
from .models.backbone import PRESETS, CausalWanModel
from .models.schedule import Schedule
from .models.vae import StreamingDecoder
from .weights import blank

COUNTED = ("condition", "denoise", "decode_first", "decode")
SPATIAL_STRIDE = 8


def without_weights(name: str, height: int, width: int, folder: Path) -> Manifest:
    """A bundle of bfloat16 graphs, without text encoder, whose parameters mean nothing. Raises SettingsError."""
    if name not in PRESETS:
        raise SettingsError(f"no architecture {name!r}: known are {', '.join(PRESETS)}")
    geometry, schedule = PRESETS[name].geometry(height // SPATIAL_STRIDE, width // SPATIAL_STRIDE), Schedule()
    with torch.device("meta"):
        backbone, vae = CausalWanModel(PRESETS[name]), AutoencoderKLWan()
    for module in (backbone, vae):
        blank(module.bfloat16())
    (folder / "onnx").mkdir()
    for graph in (
        *backbone_graphs(backbone, geometry, schedule),
        *decode_graphs(StreamingDecoder(vae), geometry),
    ):
        if graph.name in COUNTED:
            export_graph(graph, folder / "onnx")
    manifest = Manifest(
        model=f"{name} without weights",
        dtype="bf16",
        geometry=geometry,
        policy=PolicySettings(),
        schedule=schedule_info(schedule),
        source=Source("none", NO_HASH),
        text_encoder="none",
        files=measure_files(folder),
    )
    return manifest.save(folder)


def stages(work: BundleWork, geometry: Geometry) -> Iterator[tuple[str, Work]]:
    """What a chunk, a switch and a prompt are made of, by name."""
    g = geometry
    for window in (7, 8, 9, 10, 11, g.window):
        one = work.denoise(g.chunk, window * g.frame_tokens)
        yield f"one forward, window {window}", one
        yield f"chunk of {g.steps} steps and context pass, window {window}", one * (g.steps + 1)
    yield "decoding a chunk", work.decode(g.chunk)
    yield "decoding the first frame", work.decode_first()
    yield "full recache", work.denoise(g.window, g.window * g.frame_tokens)
    yield "micro recache", work.denoise(g.chunk, g.window * g.frame_tokens)
    yield "K and V of a prompt", work.condition()


def main() -> None:
    """Print work and floors as a table, or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(PRESETS))
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument(
        "--tflops", type=float, required=True, help="the machine's rate of bf16 matrix products"
    )
    parser.add_argument(
        "--terabytes", type=float, required=True, help="a second that it copies, read and written"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swiftvideo-predict-") as folder:
        manifest = without_weights(arguments.model, arguments.height, arguments.width, Path(folder))
        counted = dict(stages(BundleWork(manifest), manifest.geometry))
    rows = {
        name: {
            "tflop": work.flop / 1e12,
            "gbytes": work.bytes / 1e9,
            "flop_ms": work.flop / arguments.tflops / 1e9,
            "byte_ms": work.bytes / arguments.terabytes / 1e9,
        }
        for name, work in counted.items()
    }
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    print(f"{'':52}{'TFLOP':>9}{'GB':>8}{'FLOP ms':>9}{'byte ms':>9}")
    for name, row in rows.items():
        print(f"{name:52}{row['tflop']:9.2f}{row['gbytes']:8.2f}{row['flop_ms']:9.2f}{row['byte_ms']:9.2f}")


if __name__ == "__main__":
    main()
