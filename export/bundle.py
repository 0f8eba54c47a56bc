"""Writes bundles: the graphs of a checkpoint, its tokenizer and the manifest, in one step.

    export_bundle(load_checkpoint("Wan2.1-T2V-1.3B-Diffusers"), "wan.bundle", height=480, width=832, dtype="bf16")

A bundle is made in a folder beside its destination and moved there when it is complete, so an interrupted or failed
export leaves nothing that looks like a bundle.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.geometry import Geometry, PolicySettings
from swiftvideo.runtime.manifest import (
    TOKENIZER_NAME,
    Manifest,
    ScheduleInfo,
    Source,
    measure_files,
)

from .checkpoint import Checkpoint
from .checkpoint_files import check_finite
from .destination import check_destination, folders_above, put_in_place, work_folder, writing
from .graphs import Graph, backbone_graphs, decode_graphs, export_graph, text_graph
from .models.backbone import CausalWanModel
from .models.schedule import Schedule
from .weights import WeightFile

DType = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Progress = Callable[[str, int, int], None]
"""(graph's name, how many are done, how many there are)."""

GRAPH_COUNT = 6
NO_HASH = "0" * 64


def export_bundle(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: DType = "fp32",
    policy: PolicySettings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    consume: bool = False,
) -> Manifest:
    """Write the bundle of a checkpoint into the folder `out`.

    height, width: pixels, the checkpoint's own by default. dtype: of weights, K and V; the checkpoint's modules are
    converted in place. policy: what sessions do unless told otherwise, the checkpoint's by default. progress: called
    before each graph and at the end. consume: give up each part's weights when its graphs are written, which lowers the
    peak of memory; the checkpoint is of no use afterwards.
    Raises CheckpointError for weights that converting makes infinite; SettingsError for a wrong size, dtype or policy,
    and for an `out` where no bundle can be written or that is not empty, unless `overwrite` is set and it holds a
    bundle (`check_destination`); BundleWriteError where the disk is full or refuses, and where that stopped being so
    meanwhile: the finished bundle is then beside `out`, as the message says (`put_in_place`).
    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}: use {', '.join(DTYPES)}")
    if policy is not None and not isinstance(policy, PolicySettings):
        raise SettingsError(
            f"policy is {policy!r}: give PolicySettings(...), or None for the checkpoint's own"
        )
    geometry = checkpoint.geometry(height, width)
    schedule = checkpoint.schedule
    info = checkpoint.info if policy is None else dataclasses.replace(checkpoint.info, policy=policy)
    backbone, encoder, decoder = checkpoint.backbone, checkpoint.text_encoder, checkpoint.vae
    for part, module in (("backbone", backbone), ("text encoder", encoder), ("VAE", decoder)):
        _convert(module, DTYPES[dtype], f"the {part} of {info.name}")

    def graphs() -> Iterator[Graph]:
        yield text_graph(encoder, geometry.text_len)
        release(encoder)
        yield from backbone_graphs(backbone, geometry, schedule)
        release(backbone)
        yield from decode_graphs(decoder, geometry)
        release(decoder)

    def release(part: nn.Module) -> None:
        if consume:
            part.to("meta")

    return _write(
        Path(out),
        graphs(),
        Manifest(
            model=info.name,
            dtype=dtype,
            geometry=geometry,
            policy=info.policy,
            schedule=schedule_info(schedule),
            source=Source(f"{checkpoint.kind}; {_versions()}", checkpoint.sha256),
            text_encoder=f"{encoder.layers} layers of width {encoder.text_dim}, {encoder.vocabulary} tokens",
            files={},
        ),
        {TOKENIZER_NAME: checkpoint.tokenizer},
        overwrite,
        progress,
    )


def _convert(module: nn.Module, dtype: torch.dtype, source: str) -> None:
    """Convert weights in place, and check those that are others now: checkpoints are checked where they are read."""
    before = {name: value.dtype for name, value in module.state_dict().items()}
    after = module.to(dtype).state_dict()
    check_finite({name: value for name, value in after.items() if value.dtype != before[name]}, source)


def export_backbone(
    model: CausalWanModel, geometry: Geometry, schedule: Schedule, out: str | Path
) -> Manifest:
    """A bundle of condition, denoise and inject alone, for driving a backbone with text embeddings and latents.

    The dtype is that of the model's weights. `out` may be an empty folder.
    """
    names = {value: name for name, value in DTYPES.items()}
    manifest = Manifest(
        model="backbone",
        dtype=names[model.dtype],
        geometry=geometry,
        policy=PolicySettings(),
        schedule=schedule_info(schedule),
        source=Source("backbone", NO_HASH),
        text_encoder="none",
        files={},
    )
    return _write(Path(out), backbone_graphs(model, geometry, schedule), manifest, {}, False, None)


def schedule_info(schedule: Schedule) -> ScheduleInfo:
    """The manifest's record of a schedule."""
    count = len(schedule.steps)
    return ScheduleInfo(
        timesteps=tuple(float(t) for t in schedule.steps),
        sigmas=tuple(float(s) for s in schedule.pass_sigmas[:count]),
        context_noise=float(schedule.context_noise),
        shift=float(schedule.shift),
    )


def _versions() -> str:
    return f"swiftvideo {importlib.metadata.version('swiftvideo')}, torch {torch.__version__}"


def _write(
    out: Path,
    graphs: Iterator[Graph],
    manifest: Manifest,
    extra: dict[str, bytes],
    overwrite: bool,
    progress: Progress | None,
) -> Manifest:
    place = check_destination(out, overwrite)
    with writing(place), folders_above(place), work_folder(place) as work:
        done = _fill(work, graphs, progress)
        for name, content in extra.items():
            (work / name).write_bytes(content)
        dataclasses.replace(manifest, files=measure_files(work)).save(work)
        Manifest.load(work)  # what could not be opened replaces nothing
        work.chmod(0o755)
        put_in_place(work, place, overwrite)
    if progress:
        progress("done", done, GRAPH_COUNT)
    return Manifest.load(out)


def _fill(work: Path, graphs: Iterator[Graph], progress: Progress | None) -> int:
    """Write the graphs into the bundle `work`; return how many there were."""
    (work / "onnx").mkdir()
    done = 0
    files: dict[str, WeightFile] = {}
    for graph in graphs:
        if progress:
            progress(graph.name, done, GRAPH_COUNT)
        file = files.setdefault(graph.data, WeightFile(work / "onnx" / f"{graph.data}.data"))
        export_graph(graph, work / "onnx", file)
        done += 1
        del graph
        gc.collect()
    return done
