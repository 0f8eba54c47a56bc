"""Plans on a GPU, end to end: every graph against torch, then whole videos beside ONNX Runtime, with their times.

    python -m tests.gpu.plans --json plans.json          # the embedded model; plans are built for the GPU that is there
    python -m tests.gpu.plans --bundle wan.bundle        # another fp32 bundle; one with plans for this GPU keeps them
    python -m tests.gpu.plans --no-plugins               # where plugins fail: our ops as standard layers
    python -m tests.gpu.plans --rehearse                 # ONNX Runtime in the plans' place: does this program run?

Which of TensorRT and TensorRT-RTX is installed decides what is built. A bundle in bfloat16 has no second engine to
make videos beside: `swiftvideo verify` compares its graphs. Every figure is written as it comes; one that fails is kept
as its traceback, and the others follow (docs/hardware.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swiftvideo.export.tensorrt import build_plans
from swiftvideo.export.verify import verify_bundle
from swiftvideo.runtime.engine import Engine
from swiftvideo.runtime.engines.cuda import find_gpus
from swiftvideo.runtime.engines.onnxruntime import OnnxRuntimeEngine
from swiftvideo.runtime.engines.tensorrt import TensorRTEngine, runs
from swiftvideo.runtime.errors import EngineUnavailableError, SwiftVideoError
from swiftvideo.runtime.geometry import BridgeSettings, PolicySettings
from swiftvideo.runtime.manifest import GRAPHS, Manifest
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.pipeline import EMBEDDED
from swiftvideo.runtime.plugins.flavours import FLAVOURS, RTX, parse_target
from swiftvideo.runtime.rollout import Rollout
from swiftvideo.sdk.machine import describe

from .record import Record

POLICIES = {
    "bridges": PolicySettings(bridge=BridgeSettings(tau_low=2.0, tau_high=2.0)),
    "micro recaches": PolicySettings(bridge=BridgeSettings(tau_low=0.0, tau_high=2.0)),
    "full recaches": PolicySettings(bridge=BridgeSettings(tau_low=0.0, tau_high=0.0), global_sink=False),
    "absolute positions": PolicySettings(positions="absolute"),
}


def embeds(manifest: Manifest, seed: int) -> np.ndarray:
    """Of no text: random, float32 [1,text_len,text_dim]."""
    g = manifest.geometry
    return np.random.default_rng(seed).normal(size=(1, g.text_len, g.text_dim)).astype(np.float32)


def rollouts(
    manifest: Manifest, engines: Sequence[Engine], policy: PolicySettings, chunks: int
) -> Iterator[list[Rollout]]:
    """The engines' rollouts side by side, before every chunk, with a new prompt every third."""
    g = manifest.geometry
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    made = [
        Rollout(engine, policy, engine.condition(embeds(manifest, 0)), PhiloxNoise(5, shape))
        for engine in engines
    ]
    for index in range(chunks):
        if index % 3 == 2:
            for rollout, engine in zip(made, engines, strict=True):
                rollout.ask(engine.condition(embeds(manifest, index)))
        yield made
    for rollout in made:
        rollout.close()


@dataclasses.dataclass
class Difference:
    """Of two engines' videos."""

    latents: float = 0.0
    """Largest difference."""
    levels: int = 0
    """Largest difference of frames decoded from the same latents, of 255."""
    windows_differ: int = 0
    modes: set[str] = dataclasses.field(default_factory=set)
    """How prompts took over."""
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    """Of the first engine's chunks, decoding included."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """Of the engines, such as that denoise runs without a CUDA graph."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "modes": sorted(self.modes)}


def compare(manifest: Manifest, ours: Engine, theirs: Engine, policy: PolicySettings) -> Difference:
    """Eight chunks on both engines."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _compare(manifest, ours, theirs, policy)
    found.warnings = [str(one.message) for one in said]
    return found


def _compare(manifest: Manifest, ours: Engine, theirs: Engine, policy: PolicySettings) -> Difference:
    found = Difference()
    for first, second in rollouts(manifest, (ours, theirs), policy, 8):
        begin = time.perf_counter()
        a = first.advance()
        frames = first.tensors.decode(a.latents)
        found.milliseconds.append(1000 * (time.perf_counter() - begin))
        b = second.advance()
        wanted = second.tensors.decode(a.latents)
        assert frames.dtype == np.uint8 and frames.shape == wanted.shape
        error = np.abs(a.latents - b.latents).max()
        found.latents = float(np.maximum(found.latents, error))  # one that is not a number stays
        found.levels = max(found.levels, int(np.abs(frames.astype(int) - wanted).max()))
        found.windows_differ += a.window != b.window
        found.modes |= {a.switch.mode} if a.switch else set()
    return found


def target(capability: int) -> str:
    """What to build for the GPU that is there. Raises EngineUnavailableError where nothing can."""
    installed = [flavour for flavour in FLAVOURS.values() if flavour.installed]
    flavour = next((one for one in installed if capability in one.capabilities), None)
    if flavour is None:
        names = (
            " and ".join(one.name for one in installed) or "neither tensorrt nor tensorrt_rtx is installed"
        )
        raise EngineUnavailableError(
            f"{names}: no plans for compute capability {capability} can be built here"
        )
    return f"rtx:sm{capability}" if flavour is RTX else "h200"


def build(folder: Path, wanted: str, graph: str, plugins: bool) -> dict[str, Any]:
    """Add a graph's plan to a bundle."""
    (built,) = build_plans(folder, wanted, plugins=plugins, graphs=[graph])
    return {"plan": built.info.file, "mib": built.size / 2**20, "peak_mib": built.peak / 2**20}


def measure(folder: Path, open_ours: Callable[[Manifest], Engine], record: Record) -> None:
    """Every graph of a bundle against torch, then a video under each of `POLICIES` on ours and ONNX Runtime."""
    manifest = Manifest.load(folder)
    for graph in GRAPHS:
        record.add("verify", graph, work=lambda graph=graph: verify_bundle(folder, graphs=[graph]).as_json())  # type: ignore[misc]
    engines = functools.cache(lambda: (open_ours(manifest), OnnxRuntimeEngine(manifest)))
    for name, policy in POLICIES.items():
        record.add(
            "videos",
            name,
            work=lambda policy=policy: compare(manifest, *engines(), policy).as_json(),  # type: ignore[misc]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures as JSON; exit code 2 where no plan can run, 1 when a number is wrong or something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--no-plugins", action="store_true", help="of the plans that are built here")
    parser.add_argument("--rehearse", action="store_true", help="ONNX Runtime in the place of the plans")
    given = parser.parse_args(arguments)
    opening: Callable[[Manifest], Engine] = OnnxRuntimeEngine if given.rehearse else TensorRTEngine
    wanted, machine = None, {"gpu": None, "target": None}
    try:
        manifest = Manifest.load(given.bundle)
        if not given.rehearse:
            gpu = find_gpus()[0]
            wanted = target(gpu.capability)
            flavour = parse_target(wanted).flavour
            machine = {"gpu": gpu.name, "target": wanted, "driver": f"CUDA {gpu.driver}"}
            machine |= {flavour.name: flavour.installed, "plugins": not given.no_plugins}
    except SwiftVideoError as error:
        print(f"tests.gpu.plans: {error} (docs/hardware.md)", file=sys.stderr)
        return 2
    record = Record(given.json, {**describe(), "model": manifest.model, **machine})
    with tempfile.TemporaryDirectory() as place:
        folder = given.bundle
        if wanted is not None and not runs(manifest):
            folder = Path(shutil.copytree(folder, Path(place) / "bundle"))
            for graph in GRAPHS:
                record.add(
                    "build",
                    graph,
                    work=lambda graph=graph: build(folder, wanted, graph, not given.no_plugins),  # type: ignore[misc]
                )
        measure(folder, opening, record)
    right = not record.failed and passed(record.figures, "onnxruntime" if given.rehearse else "tensorrt")
    record.put("passed", value=right)
    record.save()
    return 0 if right else 1


def passed(figures: dict[str, Any], engine: str) -> bool:
    """Whether `engine` was compared, and all numbers are right; speed is not judged. TF32 may round products."""
    verified = all(
        one["passed"] and any(check["engine"] == engine for check in one["checks"])
        for one in figures["verify"].values()
    )
    close = all(
        one["latents"] < 2e-2 and one["levels"] <= 1 and not one["windows_differ"] and one["modes"]
        for one in figures["videos"].values()
    )
    return bool(verified and close)


if __name__ == "__main__":
    sys.exit(main())
