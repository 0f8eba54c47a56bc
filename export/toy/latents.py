"""The data of the backbone: drawn stories, encoded once by the finished encoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import scenes
from .encoder import PatchEncoder
from .vae import to_model

CHUNKS = 6
"""Chunks of a story: 18 latent frames, 69 video frames."""


def make(
    encoder: PatchEncoder, path: Path, stories: int, seed: int = 0, log: Callable[[str], None] = print
) -> None:
    """Write encoded stories: `latents` float16 [stories,18,16,8,8], `attributes` int64 [stories,6,4]."""
    rng = np.random.default_rng(seed)
    start, latents, attributes = time.monotonic(), [], []
    with torch.inference_mode():
        for number in range(stories):
            frames, each = scenes.story(rng, CHUNKS)
            mean = encoder(to_model(frames[None]))
            latents.append(mean[0].transpose(0, 1).half())
            attributes.append([chunk.indices() for chunk in each])
            if number % 200 == 199:
                log(f"latents: {number + 1} of {stories} stories, {time.monotonic() - start:.0f} s")
    torch.save({"latents": torch.stack(latents), "attributes": torch.tensor(attributes)}, path)


def load(path: Path) -> tuple[Tensor, Tensor]:
    """What `make` wrote: latents float32 [n,18,16,8,8] and attributes int64 [n,6,4]."""
    data = torch.load(path, weights_only=True)
    return data["latents"].float(), data["attributes"]


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, [16] each."""
    return latents.mean((0, 1, 3, 4)), latents.std((0, 1, 3, 4))
