"""Compares engines with the torch reference, graph by graph.

    report = verify_bundle("wan.bundle")
    print(report.failures)

The reference is the torch model in Python. Its weights are the bundle's own, found by the names that the graphs record
(weights.py), so a bundle can be verified where it is used; with a checkpoint they are the checkpoint's, so that the
export itself is verified. One graph's weights are in memory at a time. Inputs are random, and the memory tables those
that sessions have: an empty cache, a wrapped ring with bridge and anchors, a frame cut in the middle, a recache.

An engine is added by an entry in `ENGINES`.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor

from swiftvideo.runtime.errors import BundleError, BundleMissingError, EngineUnavailableError, SettingsError
from swiftvideo.runtime.manifest import GRAPHS, Manifest

from . import verify_inputs
from .bundle import DTYPES
from .checkpoint import Checkpoint
from .graphs import Graph, backbone_graphs, decode_graphs, text_graph
from .restore import named, read_graph, restored_graph

RELATIVE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1}
"""Largest allowed difference over the reference's largest value, by the bundle's dtype."""
LEVELS = {"fp32": 1, "fp16": 8, "bf16": 16}
"""Largest allowed difference of video frames, of 255 levels: one level is a rounding."""


class Runner(Protocol):
    """Some graphs of a bundle on an engine."""

    def run(self, graph: str, outputs: Sequence[str], feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs of a graph by name, on the CPU."""

    def close(self) -> None:
        """Free the weights."""


class OnnxRuntimeRunner:
    """ONNX Runtime on the CPU."""

    def __init__(self, manifest: Manifest, graphs: Sequence[str], threads: int | None) -> None:
        from swiftvideo.runtime.engines.onnxruntime import OnnxRuntimeEngine

        others = {f"onnx/{graph}.onnx" for graph in GRAPHS if graph not in graphs}
        files = {name: entry for name, entry in manifest.files.items() if name not in others}
        self._engine = OnnxRuntimeEngine(dataclasses.replace(manifest, files=files), threads)

    def run(self, graph: str, outputs: Sequence[str], feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """See `Runner.run`."""
        arrays = {name: value.contiguous().numpy() for name, value in feeds.items()}
        return [torch.from_numpy(value) for value in self._engine.run(graph, list(outputs), arrays)]

    def close(self) -> None:
        """See `Runner.close`."""
        self._engine.close()


class TensorRTRunner:
    """The bundle's plans on the first GPU."""

    def __init__(self, manifest: Manifest, graphs: Sequence[str], threads: int | None) -> None:
        from swiftvideo.runtime.engines.tensorrt import TensorRTEngine

        try:
            self._engine = TensorRTEngine(manifest, graphs=graphs)
        except BundleMissingError as error:
            raise EngineUnavailableError(str(error)) from error
        self._axes = {graph: _batch_axes(bytes(manifest.read_file(f"onnx/{graph}.onnx"))) for graph in graphs}

    def run(self, graph: str, outputs: Sequence[str], feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """See `Runner.run`. Plans take one session at a time: a batch is run item by item."""
        axes = self._axes[graph]
        count = max((value.shape[axes[name]] for name, value in feeds.items() if name in axes), default=1)
        items = []
        for item in range(count):
            part = {n: v.narrow(axes[n], item, 1) if n in axes else v for n, v in feeds.items()}
            arrays = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in part.items()}
            items.append(list(map(torch.from_numpy, self._engine.run(graph, outputs, arrays))))
        results = []
        for name, *values in zip(outputs, *items, strict=True):
            value = torch.cat(values, axes[name]) if name in axes else values[0]
            results.append(value.bfloat16() if self._engine.dtype_of(graph, name) == "bf16" else value)
        return results

    def close(self) -> None:
        """See `Runner.close`."""
        self._engine.close()


def _batch_axes(model: bytes) -> dict[str, int]:
    """Of a graph's inputs and outputs, the axis that counts sessions, where they have one."""
    graph = onnx.load_from_string(model).graph
    found = {}
    for value in (*graph.input, *graph.output):
        names = [axis.dim_param for axis in value.type.tensor_type.shape.dim]
        if "B" in names:
            found[value.name] = names.index("B")
    return found


Opening = Callable[[Manifest, Sequence[str], int | None], Runner]
ENGINES: dict[str, Opening] = {"onnxruntime": OnnxRuntimeRunner, "tensorrt": TensorRTRunner}
"""How an engine opens some of a bundle's graphs (none: just to see whether it can run here), with so many threads.

Raises EngineUnavailableError where it cannot.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One output of one run, compared."""

    graph: str
    case: str
    engine: str
    output: str
    error: float
    """Relative to the reference's largest value; of frames: levels of 255. Infinite where it is not a number."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Report:
    """All that was compared."""

    bundle: str
    weights: str
    """Where the reference's weights came from."""
    checks: list[Check] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Engines that cannot run the bundle here, and why."""

    @property
    def failures(self) -> list[Check]:
        """What exceeds its tolerance."""
        return [check for check in self.checks if not check.passed]

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite error is null."""
        checks = []
        for check in self.checks:
            error = check.error if check.error < float("inf") else None
            checks.append(dataclasses.asdict(check) | {"error": error, "passed": check.passed})
        return {
            "bundle": self.bundle,
            "weights": self.weights,
            "passed": not self.failures,
            "checks": checks,
            "unavailable": self.unavailable,
        }


def verify_bundle(
    folder: str | Path,
    checkpoint: Checkpoint | None = None,
    *,
    graphs: Sequence[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Compare the graphs of the bundle at `folder` on every engine that can run it with the torch reference.

    checkpoint: whose weights the reference takes, converted to the bundle's dtype in place; None: the bundle's own.
    graphs: names of those to compare; None: all. threads: of CPU engines. seed: of the inputs. progress: (graph, done,
    all), before each graph.
    Raises EngineUnavailableError where no engine can run the bundle, BundleError where a file was changed or has no
    record of its weights, SettingsError where checkpoint and bundle are of different sizes or a graph is not there.
    """
    manifest = Manifest.load(folder)
    manifest.check_sizes()
    weights = "the bundle's own" if checkpoint is None else checkpoint.kind
    report = Report(str(folder), weights)
    for engine, opening in ENGINES.items():
        try:
            opening(manifest, (), threads).close()
        except EngineUnavailableError as error:
            report.unavailable[engine] = str(error)
    usable = {engine: opening for engine, opening in ENGINES.items() if engine not in report.unavailable}
    if not usable:
        reasons = "; ".join(f"{engine}: {reason}" for engine, reason in report.unavailable.items())
        raise EngineUnavailableError(
            f"no engine can run this bundle here, so nothing was compared. {reasons}"
        )
    if checkpoint is not None:
        _check_sizes(manifest, checkpoint)
    names = [name for name in GRAPHS if manifest.has(f"onnx/{name}.onnx")]
    if graphs is not None:
        if unknown := set(graphs) - set(names):
            raise SettingsError(
                f"no graph {', '.join(sorted(unknown))} in this bundle: it has {', '.join(names)}"
            )
        names = [name for name in names if name in graphs]
    for done, name in enumerate(names):
        if progress:
            progress(name, done, len(names))
        report.checks.extend(_verify_graph(manifest, name, checkpoint, usable, threads, seed))
        gc.collect()
    if progress:
        progress("done", len(names), len(names))
    return report


def _verify_graph(
    manifest: Manifest,
    name: str,
    checkpoint: Checkpoint | None,
    engines: Mapping[str, Opening],
    threads: int | None,
    seed: int,
) -> Iterator[Check]:
    model = read_graph(manifest, name)
    graph = (
        restored_graph(manifest, name, model)
        if checkpoint is None
        else _of_checkpoint(manifest, name, checkpoint)
    )
    wide = name == "text_encoder" and manifest.dtype == "fp16"
    if wide:  # what the graph computes in float16 may overflow, and the reference's float32 does not
        graph.module.float()
    cases = verify_inputs.cases(graph, manifest.geometry, torch.Generator().manual_seed(seed))
    pairs = [(label, feeds, graph.run(feeds)) for label, feeds in cases]
    if wide:
        pairs = [
            (label, feeds, [value.to(DTYPES[manifest.dtype]) for value in made])
            for label, feeds, made in pairs
        ]
    outputs = graph.outputs
    for label, _, expected in pairs:
        for output, value in zip(outputs, expected, strict=True):
            if not torch.isfinite(value.float()).all():
                raise BundleError(
                    f"{name}, {label}: the reference's {output} is not finite. The graph does not record all of its "
                    "weights, or they overflow: export the bundle again, or compare it with its checkpoint "
                    "(--checkpoint)"
                )
    del graph
    gc.collect()
    for engine, opening in engines.items():
        runner = opening(manifest, (name,), threads)
        for label, feeds, expected in pairs:
            made = runner.run(name, outputs, feeds)
            for output, ours, theirs in zip(outputs, made, expected, strict=True):
                yield _compare(
                    Check(name, label, engine, output, 0.0, RELATIVE[manifest.dtype]), ours, theirs
                )
        runner.close()


def _compare(check: Check, made: Tensor, expected: Tensor) -> Check:
    if made.shape != expected.shape or made.dtype != expected.dtype:
        raise BundleError(
            f"{check.graph}, {check.case}: {check.output} is {made.dtype} {tuple(made.shape)} on {check.engine} and "
            f"{expected.dtype} {tuple(expected.shape)} in torch: export the bundle again with this version"
        )
    ours, theirs = made.double(), expected.double()
    error = float((ours - theirs).abs().max())
    if expected.dtype == torch.uint8:
        levels = {value: LEVELS[key] for key, value in RELATIVE.items()}[check.tolerance]
        return dataclasses.replace(check, error=error, tolerance=levels)
    scale = float(theirs.abs().max())
    relative = error / scale if scale else error
    return dataclasses.replace(check, error=relative if relative == relative else float("inf"))


def _check_sizes(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """The checkpoint has the bundle's geometry at the bundle's size."""
    theirs = checkpoint.geometry(manifest.geometry.height, manifest.geometry.width)
    different = [
        f"{item.name} {getattr(theirs, item.name)} instead of {getattr(manifest.geometry, item.name)}"
        for item in dataclasses.fields(theirs)
        if getattr(theirs, item.name) != getattr(manifest.geometry, item.name)
    ]
    if different:
        raise SettingsError(
            f"the checkpoint has {', '.join(different)}: compare the bundle with the checkpoint that it was made from"
        )


def _of_checkpoint(manifest: Manifest, name: str, checkpoint: Checkpoint) -> Graph:
    dtype = DTYPES[manifest.dtype]
    if name == "text_encoder":
        return text_graph(checkpoint.text_encoder.to(dtype), manifest.geometry.text_len)
    if name.startswith("decode"):
        return named(decode_graphs(checkpoint.vae.to(dtype), manifest.geometry), name)
    return named(backbone_graphs(checkpoint.backbone.to(dtype), manifest.geometry, checkpoint.schedule), name)
