"""Plans on a GPU, end to end: every graph against torch, then whole videos beside ONNX Runtime, then times.

    python -m tests.gpu.plans --json plans.json          # the embedded model; plans are built for the GPU that is there
    python -m tests.gpu.plans --bundle wan.bundle        # another fp32 bundle; one with plans for this GPU keeps them

Which of TensorRT and TensorRT-RTX is installed decides what is built. A bundle in bfloat16 has no second engine to
make videos beside: `swiftvideo verify` compares its graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.pipeline import EMBEDDED
from swiftvideo.runtime.plugins.flavours import FLAVOURS, RTX
from swiftvideo.runtime.rollout import Rollout
from swiftvideo.sdk.machine import describe

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


def compare(manifest: Manifest, ours: Engine, theirs: Engine, policy: PolicySettings) -> Difference:
    """Eight chunks on both engines."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures as JSON; exit code 2 where no plan can run, 1 when a number is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    try:
        gpu = find_gpus()[0]
        wanted = target(gpu.capability)
    except SwiftVideoError as error:
        print(f"tests.gpu.plans: {error} (docs/hardware.md)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        folder = given.bundle
        if not runs(Manifest.load(folder)):
            folder = Path(shutil.copytree(folder, Path(place) / "bundle"))
            build_plans(folder, wanted)
        result: dict[str, Any] = {**describe(), "gpu": gpu.name, "target": wanted}
        report = verify_bundle(folder)
        result["verify"] = report.as_json()
        manifest = Manifest.load(folder)
        ours, theirs = TensorRTEngine(manifest), OnnxRuntimeEngine(manifest)
        found = {name: compare(manifest, ours, theirs, policy) for name, policy in POLICIES.items()}
    result["videos"] = {
        name: {**dataclasses.asdict(one), "modes": sorted(one.modes)} for name, one in found.items()
    }
    result["passed"] = passed(result)
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    return 0 if result["passed"] else 1


def passed(result: dict[str, Any]) -> bool:
    """Whether TensorRT was compared, and all numbers are right; speed is not judged. TF32 may round products."""
    verified = result["verify"]["passed"] and "tensorrt" not in result["verify"]["unavailable"]
    close = all(
        one["latents"] < 2e-2 and one["levels"] <= 1 and not one["windows_differ"] and one["modes"]
        for one in result["videos"].values()
    )
    return bool(verified and close)


if __name__ == "__main__":
    sys.exit(main())
