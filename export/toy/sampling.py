"""A plain torch loop over the trained parts, with the runtime's session API: a check of a model in training.

It keeps no cache: each pass computes the sink, the last two chunks and the new one together, and it knows
no bridge and no anchors. What the runtime makes of the same weights is measured with the runtime itself
(evaluate.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from swiftvideo.export.models.schedule import Schedule

from . import teacher_forcing as forcing
from .network import Network


@dataclass(frozen=True, slots=True)
class SampledChunk:
    """What a session yields."""

    index: int
    frames: NDArray[np.uint8]
    """[n,64,64,3]: 9 of the first chunk, then 12."""


class TorchPipeline:
    """Network and autoencoder as a pipeline."""

    def __init__(self, network: Network, vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
        """mean, std: float32 [16], of the latents."""
        self.network, self.vae = network.eval(), vae.eval()
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def session(self, prompt: str, seed: int = 0) -> TorchSession:
        """A new video."""
        return TorchSession(self, prompt, seed)


class TorchSession:
    """One video: iterate for chunks, call `prompt` for a switch at the next one."""

    def __init__(self, pipeline: TorchPipeline, prompt: str, seed: int) -> None:
        self._pipeline, self._prompt = pipeline, prompt
        self._generator = torch.Generator().manual_seed(seed)
        self._past: list[tuple[Tensor, str]] = []
        self._features: list[Any] = [None] * pipeline.vae._cached_conv_counts["decoder"]

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._past.clear()

    def prompt(self, text: str) -> None:
        """Switch at the next chunk."""
        self._prompt = text

    def __iter__(self) -> Iterator[SampledChunk]:
        index = 0
        while True:
            with torch.inference_mode():
                latents = self._denoise()
                self._past.append((latents, self._prompt))
                self._past[1:] = self._past[1:][-2:]  # the sink and the last two chunks
                frames = self._decode(latents[0])
            yield SampledChunk(index, frames)
            index += 1

    def _denoise(self) -> Tensor:
        network, schedule = self._pipeline.network, Schedule()
        sigmas = [float(sigma) for sigma in schedule.pass_sigmas[:-1]]
        clean = [latents for latents, _ in self._past]
        count, size = len(clean), forcing.CHUNK
        embeds = network.embeds([text for _, text in self._past] + [self._prompt])[None]
        frames = torch.arange((count + 1) * size)
        x = torch.randn(1, size, 16, 8, 8, generator=self._generator)
        mask = forcing.block_mask(count, [count], 2 * 48, 48, memory=False, rows=0)[None]
        for step, sigma in enumerate(sigmas):
            t = torch.cat([torch.zeros(count * size), torch.full((size,), 1000 * sigma)])[None]
            flow = forcing.forward(network.wan, torch.cat([*clean, x], 1), t, frames, embeds, mask)
            x = x - sigma * flow[:, count * size :]
            if step + 1 < len(sigmas):
                x = x.lerp(torch.randn(x.shape, generator=self._generator), sigmas[step + 1])
        return x

    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """latents [F,16,8,8] -> the next frames of the video, uint8."""
        pipeline = self._pipeline
        z = pipeline.vae.post_quant_conv((latents * pipeline.std + pipeline.mean).transpose(0, 1)[None])
        parts = []
        for number in range(z.shape[2]):
            one = z[:, :, number : number + 1]
            parts.append(pipeline.vae.decoder(one, feat_cache=self._features, feat_idx=[0]))
        clip = torch.cat(parts, 2)[0].permute(1, 2, 3, 0)
        frames: NDArray[np.uint8] = ((clip.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        return frames
