"""A bundle's torch models, built again from the bundle alone, and a pipeline over them.

    with open_torch("wan.bundle", device="cuda") as pipeline: ...

The graphs record what their modules were built from and which initialiser each parameter is (weights.py). Large weights
are views of the files' verified bytes until they are moved to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import onnx
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5EncoderModel

from swiftvideo.runtime.errors import (
    BundleError,
    BundleMissingError,
    EngineUnavailableError,
    SettingsError,
    SwiftVideoError,
)
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.pipeline import EMBEDDED, Pipeline

from .bundle import DTYPES
from .cuda import CudaEngine
from .graphs import Condition, Decode, Denoise, Graph, backbone_graphs, decode_graphs, text_graph
from .models.backbone import BackboneConfig, CausalWanModel
from .models.schedule import TRAINING_STEPS, Schedule
from .models.text import TextEncoder, umt5_config
from .models.vae import StreamingDecoder
from .torch_engine import TorchEngine
from .weights import blank, blanks, config_of, restore

M = TypeVar("M", bound=nn.Module)

Read = Callable[[str], memoryview]
"""Bytes of a data file by its name beside the graphs, read once."""
TIME_MLP = ("time_embedding.", "time_projection.")
"""Parameters of a backbone that graphs leave out: they have its outputs for every step instead."""


def open_torch(
    path: str | Path | None = None, device: str | None = None, threads: int | None = None
) -> Pipeline:
    """A bundle on the torch engine, as `swiftvideo.runtime.load` opens it on the others.

    path: of a bundle's folder; None: the embedded model. device: "cpu", "cuda" or "cuda:N"; None: the GPU that torch
    sees, else the CPU. threads: of torch on the CPU, for the whole process; None: as they are.

    Raises:
        BundleError: the bundle is missing, was changed, or does not record its weights.
        EngineUnavailableError: torch sees no such device.
        SettingsError: `device` names none, or `path` cannot be a name.
    """
    chosen = torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    manifest = Manifest.load(EMBEDDED if path is None else path)
    return Pipeline(engine_of(manifest, chosen), manifest)


def torch_device(name: str | None = None) -> torch.device:
    """The device `name`, the GPU that torch sees or the CPU if None. Raises EngineUnavailableError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device is {name!r}: use 'cpu', 'cuda' or 'cuda:0'") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device is {name!r}: use 'cpu', 'cuda' or 'cuda:0'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineUnavailableError(
            f"device is {name!r} and torch {torch.__version__} sees {torch.cuda.device_count()} NVIDIA GPUs: install a "
            "build of torch for CUDA, or use 'cpu'"
        )
    return device


def engine_of(manifest: Manifest, device: torch.device) -> TorchEngine:
    """The torch engine with all networks of a bundle. Raises BundleError."""
    read = _reader(manifest)

    def fill(name: str, module: M) -> M:
        restore(module, read_graph(manifest, name), name, read)
        return module

    with _reading():
        backbone = _backbone(manifest, config_of(read_graph(manifest, "denoise"), "denoise"))
        schedule = schedule_of(manifest)
        denoise = fill("denoise", Denoise(backbone, manifest.geometry, schedule))
        fill("condition", Condition(backbone))
        decoder = _decoder(manifest, config_of(read_graph(manifest, "decode"), "decode"))
        fill("decode", Decode(decoder))
        encoder = _text(manifest, config_of(read_graph(manifest, "text_encoder"), "text_encoder"))
        fill("text_encoder", text_graph(encoder, manifest.geometry.text_len).module)
    for part in (backbone, decoder, encoder):
        lost = [name for name in blanks(part) if not (part is backbone and name.startswith(TIME_MLP))]
        if lost:
            raise BundleError(f"the bundle does not record {lost[0]}: export it again with this version")
    times = (denoise.e, denoise.e0)
    kind = TorchEngine if device.type == "cpu" else CudaEngine
    return kind(backbone, manifest.geometry, schedule, decoder, encoder.to(device), device, times)


def restored_graph(manifest: Manifest, name: str, model: onnx.ModelProto) -> Graph:
    """The torch model of one graph, with the weights that the graph records. Raises BundleError."""
    g = manifest.geometry
    with _reading():
        config = config_of(model, name)
        if name == "text_encoder":
            graph = text_graph(_text(manifest, config), g.text_len)
        elif name.startswith("decode"):
            graph = named(decode_graphs(_decoder(manifest, config), g), name)
        else:
            graph = named(backbone_graphs(_backbone(manifest, config), g, schedule_of(manifest)), name)
        restore(graph.module, model, name, _reader(manifest))
    return graph


def named(graphs: Iterator[Graph], name: str) -> Graph:
    """The graph of that name."""
    return next(graph for graph in graphs if graph.name == name)


def schedule_of(manifest: Manifest) -> Schedule:
    """The schedule whose steps are the manifest's."""
    info = manifest.schedule
    grid = torch.from_numpy(Schedule(info.shift).timesteps)
    indices = [TRAINING_STEPS - int((grid - time).abs().argmin()) for time in info.timesteps]
    return Schedule(info.shift, indices, info.context_noise)


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what is raised for graphs and records of which no model can be made into BundleError."""
    try:
        yield
    except (SwiftVideoError, MemoryError):
        raise
    except Exception as error:  # odd values fail anywhere in onnx, diffusers, transformers and torch
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BundleError(
            f"the bundle records models that cannot be built ({reason:.200}): export it again"
        ) from error


def read_graph(manifest: Manifest, name: str) -> onnx.ModelProto:
    """A graph of the bundle as ONNX has it. Raises BundleError."""
    file = f"onnx/{name}.onnx"
    if not manifest.has(file):
        raise BundleMissingError(f"the bundle at {str(manifest.folder)!r} lists no {file}: export it again")
    with _reading():
        return onnx.load_model_from_string(bytes(manifest.read_file(file)))


def _reader(manifest: Manifest) -> Read:
    kept: dict[str, memoryview] = {}

    def read(file: str) -> memoryview:
        if file not in kept:
            kept[file] = manifest.read_file(f"onnx/{file}")
        return kept[file]

    return read


def _text(manifest: Manifest, config: dict[str, Any]) -> TextEncoder:
    with torch.device("meta"):
        umt5 = UMT5EncoderModel(umt5_config(config["text_encoder"]))
        encoder = TextEncoder(umt5).to(DTYPES[manifest.dtype])
    return blank(encoder)


def _decoder(manifest: Manifest, config: dict[str, Any]) -> StreamingDecoder:
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config["vae"])
    # The whole decoder is converted: diffusers' own model says on stderr that it does not like to be.
    return blank(StreamingDecoder(vae).to(DTYPES[manifest.dtype]))


def _backbone(manifest: Manifest, config: dict[str, Any]) -> CausalWanModel:
    backbone = config.get("backbone") or _no_weights(manifest)
    with torch.device("meta"):
        wan = CausalWanModel(BackboneConfig(**backbone | {"patch": tuple(backbone["patch"])}))
    return blank(wan.to(DTYPES[manifest.dtype]))


def _no_weights(manifest: Manifest) -> dict[str, Any]:
    """A backbone of the manifest's shapes for `inject`, which has none of its weights."""
    g = manifest.geometry
    sizes = {"dim": g.dim, "ffn_dim": 1, "num_heads": g.heads, "num_layers": g.layers}
    return sizes | {
        "text_dim": g.text_dim,
        "text_len": g.text_len,
        "in_channels": g.latent_channels,
        "patch": g.patch,
    }
