"""The TensorRT engine end to end on a GPU: a bundle's plans against ONNX Runtime, and their speed.

    swiftvideo export --out wan.bundle --target rtx:sm89
    python -m tests.gpu.engine --bundle wan.bundle --chunks 12 --json engine.json

Without --bundle the embedded model runs; it needs plans too. bfloat16 bundles have no engine to compare with on a CPU,
so only their speed is told, and whether every frame is finite and moves.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from swiftvideo.runtime import Manifest, load
from swiftvideo.runtime.errors import SwiftVideoError
from swiftvideo.runtime.pipeline import EMBEDDED

CLOSE = 0.02
"""Largest difference of latents (of size 1) to ONNX Runtime's; TensorRT may compute float32 products in tf32."""


def roll(bundle: Path, engine: str, chunks: int, prompts: list[str]) -> tuple[list[Any], list[float]]:
    """Chunks of a video with a new prompt in its middle, and the seconds that each took."""
    made, seconds = [], []
    with load(bundle, engine) as pipeline, pipeline.session(prompts[0], seed=7) as session:
        for index in range(chunks):
            if index == chunks // 2:
                session.prompt(prompts[1])
            began = time.perf_counter()
            made.append(next(session))
            seconds.append(time.perf_counter() - began)
    return made, seconds


def measure(bundle: Path, chunks: int) -> dict[str, Any]:
    """What the engine made, how fast, and how far it is from ONNX Runtime where that can run the bundle."""
    manifest = Manifest.load(bundle)
    with load(bundle, "tensorrt") as pipeline:
        words = [word for word in pipeline.words if word.isalnum()]
        machine = {"gpu": pipeline.engine.gpu.name, "driver": pipeline.engine.gpu.driver}  # type: ignore[attr-defined]
    prompts = ["a red circle moving right at night", "a yellow square moving up in the fog"]
    if not all(word in words for prompt in prompts for word in prompt.split()):
        prompts = [" ".join(words[:6]), " ".join(words[6:12])]
    ours, seconds = roll(bundle, "tensorrt", chunks, prompts)
    steady = seconds[chunks // 2 + 2 :]
    frames = np.concatenate([chunk.frames for chunk in ours])
    result: dict[str, Any] = {
        "machine": machine,
        "model": manifest.model,
        "dtype": manifest.dtype,
        "frames": len(frames),
        "finite": all(np.isfinite(chunk.latents).all() for chunk in ours),
        "moves": bool((frames[1:] != frames[:-1]).any()),
        "modes": [chunk.mode for chunk in ours if chunk.mode],
        "first_chunk_s": seconds[0],
        "frames_per_s": len(ours[-1].frames) * len(steady) / sum(steady),
        "stages_ms": {name: 1e3 * value for name, value in ours[-1].timings.items()},
    }
    result["passed"] = result["finite"] and result["moves"]
    if manifest.dtype != "bf16":
        theirs, _ = roll(bundle, "onnxruntime", chunks, prompts)
        far = [float(np.abs(a.latents - b.latents).max()) for a, b in zip(ours, theirs, strict=True)]
        result |= {"max_difference_by_chunk": far, "passed": result["passed"] and far[0] < CLOSE}
    return result


def main() -> int:
    """Print the figures as JSON; exit code 2 where the engine cannot run, 1 when a number is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.chunks < 6:
        parser.error(f"--chunks is {arguments.chunks}: use at least 6, half of them after a new prompt")
    try:
        result = measure(arguments.bundle, arguments.chunks)
    except SwiftVideoError as error:
        print(f"tests.gpu.engine: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
