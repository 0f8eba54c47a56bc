"""The encoder that gives the embedded model its latents: a small network over patches of 4 frames x 8 x 8 pixels.

Nothing encodes at run time, so the encoder need not be an AutoencoderKLWan: it is trained in minutes against
a decoder of its own kind that is thrown away. Its latents have unit variance per channel and survive noise.
The decoder that is shipped (vae.py) and the backbone then learn from the same fixed latents side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .optim import Muon

CHANNELS = 16
WIDTH = 192
NOISE = 0.15
"""Standard deviation of the noise that training adds to the latents."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.out(functional.gelu(self.mix(functional.gelu(x))))
        return result


class PatchEncoder(nn.Module):
    """clips [B,3,1+4k,H,W] in -1..1 -> latents [B,16,1+k,H/8,W/8]; a latent frame knows its own frames only."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(12, width, 8, 8), _Residual(width), _Residual(width), nn.Conv2d(width, CHANNELS, 1)
        )
        self.scale = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.02)

    def forward(self, clips: Tensor) -> Tensor:
        latents: Tensor = self.scale(self.body(_fold(clips)))
        return latents.unflatten(0, (len(clips), -1)).transpose(1, 2)


class PatchDecoder(nn.Module):
    """latents [B,16,1+k,h,w] -> clips [B,3,4+4k,8h,8w], the first frame 4 times: the encoder's partner in training."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1),
            _Residual(width),
            _Residual(width),
            nn.ConvTranspose2d(width, 12, 8, 8),
        )

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.body(latents.transpose(1, 2).flatten(0, 1))
        frames = pixels.unflatten(1, (4, 3)).unflatten(0, (len(latents), -1)).flatten(1, 2)
        return frames.transpose(1, 2)


def _fold(clips: Tensor) -> Tensor:
    """[B,3,1+4k,H,W] -> [B*(1+k),12,H,W]; the first frame stands four times."""
    frames = torch.cat([clips[:, :, :1].expand(-1, -1, 3, -1, -1), clips], 2).transpose(1, 2)
    return frames.unflatten(1, (-1, 4)).flatten(0, 1).flatten(1, 2)


def train(
    path: Path,
    minutes: float,
    *,
    clips: int = 8,
    rate: float = 0.02,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Train for `minutes` of wall clock, at least one step, and write the encoder's state to `path`.

    Loss: L1 + L1 of gradients + MSE. Muon with a linear decay.
    """
    from .vae import drawn_batch, pixel_loss

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, decoder = PatchEncoder(), PatchDecoder()
    parameters = [*encoder.named_parameters(), *decoder.named_parameters()]
    ends = {id(module) for module in (encoder.body[3].weight, decoder.body[0].weight, decoder.body[3].weight)}
    matrices = [p for _, p in parameters if p.ndim > 1 and id(p) not in ends]
    others = [p for _, p in parameters if p.ndim == 1 or id(p) in ends]
    muon = Muon(matrices, rate)
    adam = torch.optim.AdamW(others, 2e-3, betas=(0.9, 0.98), weight_decay=0)
    start, step, total, squares = time.monotonic(), 0, 0.0, 0.0
    while (done := (time.monotonic() - start) / (minutes * 60)) < 1 or step == 0:
        pace = min(1.0, (step + 1) / 50) * max(0.01, 1 - done)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate * pace, 2e-3 * pace
        batch = drawn_batch(rng, 9, clips)
        latents = encoder(batch)
        shown = decoder(latents + NOISE * torch.randn_like(latents))[:, :, 3:]
        loss = pixel_loss(batch, shown)
        for optimizer in (muon, adam):
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        step, total = step + 1, total + loss.item()
        squares += (shown.detach() - batch).square().mean().item()
        if step % 100 == 0:
            decibels = 10 * np.log10(4 / (squares / 100))
            log(f"encoder {done * minutes:5.1f} min, step {step}: loss {total / 100:.4f}, {decibels:.1f} dB")
            total = squares = 0.0
            torch.save(encoder.state_dict(), path)
    torch.save(encoder.state_dict(), path)
    log(f"encoder done after {step} steps")


def load(path: Path) -> PatchEncoder:
    """The encoder that `train` wrote, fixed."""
    encoder = PatchEncoder()
    encoder.load_state_dict(torch.load(path, weights_only=True))
    return encoder.eval().requires_grad_(False)
