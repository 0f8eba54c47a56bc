"""The model on the engine under test and on the reference, with inputs and a clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from swiftvideo.export.cuda import CudaEngine, Options
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.models.vae import StreamingDecoder
from swiftvideo.export.random import random_video_models
from swiftvideo.export.torch_engine import TorchEngine, TorchSession
from swiftvideo.runtime.engine import Float32, Frames, Int32, Prompt
from swiftvideo.runtime.geometry import Geometry, PolicySettings
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.rollout import Rollout

MODEL, HEIGHT, WIDTH = "wan2.1-t2v-1.3b", 480, 832
KEYS = 4.0
"""Size of the cached keys. Over thousands of size 1 attention is nearly their mean: losing it would not show."""


@contextmanager
def exact() -> Iterator[None]:
    """Float32 that is float32: no TF32, and no algorithm chosen by trial."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Reference(TorchEngine):
    """`TorchEngine`, exact whatever the engine beside it has set for the process."""

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`."""
        with exact():
            return super().condition(embeds, text)

    def open(self, batch: int = 1) -> ReferenceSession:
        """See `Engine.open`."""
        return ReferenceSession(self, batch)


class ReferenceSession(TorchSession):
    """A session of `Reference`."""

    def denoise(self, *arguments: Any) -> None:
        """See `EngineSession.denoise`."""
        with exact():
            super().denoise(*arguments)

    def decode(self, latents: Float32) -> Frames:
        """See `EngineSession.decode`."""
        with exact():
            return super().decode(latents)


class Bench:
    """Weights, the engines over copies of them, and where they run."""

    def __init__(
        self, backbone: CausalWanModel, vae: StreamingDecoder, geometry: Geometry, schedule: Schedule
    ) -> None:
        self.backbone, self.vae, self.geometry, self.schedule = backbone, vae, geometry, schedule
        self.device = backbone.patch_embedding.weight.device
        self.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[backbone.dtype]

    @classmethod
    def full_size(cls, device: torch.device) -> Bench:
        """The 1.3B model with random weights, made on the device."""
        generator = torch.Generator(device).manual_seed(0)
        backbone, vae = random_video_models(MODEL, torch.bfloat16, generator)
        strides = {"temporal_stride": vae.temporal_stride, "spatial_stride": vae.spatial_stride}
        height, width = HEIGHT // vae.spatial_stride, WIDTH // vae.spatial_stride
        return cls(backbone, vae, backbone.config.geometry(height, width, **strides), Schedule())

    def engine(self, options: Options | None = None) -> CudaEngine:
        """The engine under test; it has no text encoder."""
        return CudaEngine(
            copy.deepcopy(self.backbone),
            self.geometry,
            self.schedule,
            copy.deepcopy(self.vae),
            device=self.device,
            options=options,
            rehearse=self.device.type == "cpu",
        )

    def reference(self) -> Reference:
        """Plain torch in float32."""
        backbone, vae = copy.deepcopy(self.backbone).float(), copy.deepcopy(self.vae).float()
        return Reference(backbone, self.geometry, self.schedule, vae, device=self.device)

    def latents(self, frames: int, seed: int) -> np.ndarray:
        """Normal, float32 [1,F,C,h,w]."""
        g = self.geometry
        shape = (1, frames, g.latent_channels, g.latent_height, g.latent_width)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def prompt(self, engine: TorchEngine, seed: int) -> Prompt:
        """Of random embeddings, a quarter of the longest."""
        g = self.geometry
        embeds = np.random.default_rng(seed).standard_normal((1, g.text_len, g.text_dim)).astype(np.float32)
        embeds[:, max(2, g.text_len // 4) :] = 0
        return engine.condition(embeds, f"random {seed}")

    def fill(self, sessions: Sequence[TorchSession]) -> None:
        """The same normal values in all caches; keys are `KEYS` times as large."""
        self.wait()  # they are cleared on streams of their own
        generator = torch.Generator(self.device).manual_seed(3)
        for name, size in (("cache_k", KEYS), ("cache_v", 1.0)):
            like = getattr(sessions[0], name)
            values = size * torch.randn(like.shape, generator=generator, device=self.device)
            for session in sessions:
                getattr(session, name).copy_(values.to(like.dtype))
        self.wait()

    def table(self, window: int) -> Int32:
        """int32 [6,2] of a late chunk without memory rows: sink, ring, the chunk itself, window * P keys in all."""
        g = self.geometry
        sink, fresh = g.sink * g.frame_tokens, g.chunk * g.frame_tokens
        ring = window * g.frame_tokens - sink - fresh
        rows = [
            (g.memory_rows, sink),
            (g.memory_rows + sink, max(0, ring)),
            (g.rows - min(0, ring), fresh + min(0, ring)),
        ]
        return padded(rows)

    def roll(self, engine: TorchEngine, prompt: Prompt, settings: PolicySettings) -> Rollout:
        """A video."""
        shape = self.latents(self.geometry.chunk, 0).shape
        return Rollout(engine, settings, prompt, PhiloxNoise(4, shape))

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Mean wall-clock seconds of `work`, GPU included, after two runs that do not count."""
        for _ in range(2):
            work()
        self.wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - begin) / repeats

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def padded(rows: Sequence[tuple[int, int]]) -> Int32:
    """A table of six segments, int32 [6,2], those that are not there of length 0."""
    return np.array([*rows, *[(0, 0)] * (6 - len(rows))], np.int32)
