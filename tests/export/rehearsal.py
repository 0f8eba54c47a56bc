"""The engine for GPUs on the CPU, beside the reference, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from swiftvideo.export.cuda import CudaEngine
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime.geometry import PolicySettings
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.rollout import Rollout

from . import small


def engines(**more: Any) -> tuple[TorchEngine, CudaEngine]:
    """The reference and the rehearsed engine over equal weights."""
    torch.set_num_threads(1)
    made = []
    for kind, settings in ((TorchEngine, {}), (CudaEngine, {"rehearse": True, **more})):
        source = small.checkpoint()
        geometry = source.geometry()
        made.append(
            kind(
                source.backbone, geometry, source.schedule, source.vae, source.text_encoder, "cpu", **settings
            )
        )
    return made[0], made[1]  # type: ignore[return-value]


def switching(engine: TorchEngine, settings: PolicySettings, seed: int = 1) -> Rollout:
    """A video whose prompt changes in its third chunk."""
    g = engine.geometry
    generator = np.random.default_rng(seed)
    embeds = generator.standard_normal((2, 1, g.text_len, g.text_dim)).astype(np.float32)
    prompts = [engine.condition(value) for value in embeds]
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    rollout = Rollout(engine, settings, prompts[0], PhiloxNoise(seed, shape))
    rollout.ask(prompts[1], 2 * g.chunk)
    return rollout
