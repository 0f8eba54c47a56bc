"""The video decoder of the embedded model: that of diffusers' AutoencoderKLWan, small, and its training.

diffusers runs this class one latent frame at a time through a feature cache. Training needs one
differentiable pass over a whole clip; called without a cache the class leaves out the resampling in time.
`whole_sequence` corrects that. The latents come from encoder.py; the encoder of this class stays untrained.
"""

from __future__ import annotations

import copy
import math
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm
from torch import Tensor, nn

from . import scenes
from .encoder import PatchEncoder
from .optim import Muon, follow

CHANNELS = 16
Log = Callable[[str], None]


def build(base: int = 8, multipliers: tuple[int, ...] = (1, 2, 4, 4)) -> AutoencoderKLWan:
    """An untrained autoencoder, 8 times smaller in space and 4 times in time, ready for whole sequences."""
    vae = AutoencoderKLWan(
        base_dim=base,
        z_dim=CHANNELS,
        dim_mult=list(multipliers),
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    return whole_sequence(vae)


def whole_sequence(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Make `vae.decoder(z)` without a cache equal what the cached calls give, and its norms quicker.

    The methods are bound on the instances: the classes, and so any other model in the process, stay as they
    are.
    """
    for module in vae.decoder.modules():
        if isinstance(module, WanResample):
            module.forward = types.MethodType(_whole_resample(module.forward), module)
        elif isinstance(module, WanRMS_norm):
            module.forward = types.MethodType(_rms_norm, module)
    return vae


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    """What WanRMS_norm does; a step of training takes a third less time."""
    result: Tensor = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * self.gamma + self.bias
    return result


def _whole_resample(cached: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        if feat_cache is not None:
            return cached(x, feat_cache, feat_idx)
        if self.mode == "upsample3d" and x.shape[2] > 1:  # all but the first frame become two
            batch, channels, count, height, width = x.shape
            pairs = self.time_conv(x[:, :, 1:]).reshape(batch, 2, channels, count - 1, height, width)
            doubled = pairs.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, -1, height, width)
            x = torch.cat([x[:, :, :1], doubled], 2)
        frames: Tensor = self.resample(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    return forward


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """latents [B,16,1+k,h,w] -> clips [B,3,1+4k,8h,8w], about -1..1."""
    clips: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clips


def drawn_batch(rng: np.random.Generator, frames: int, count: int) -> Tensor:
    """`count` clips of `frames` frames: float32 [count,3,frames,64,64] in -1..1."""
    return to_model(np.stack([scenes.clip(rng, frames) for _ in range(count)]))


def to_model(clips: scenes.Frames) -> Tensor:
    """float32 [B,T,H,W,3] in 0..255 -> [B,3,T,H,W] in -1..1."""
    return (torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 127.5 - 1).contiguous()


@torch.no_grad()
def psnr(
    vae: AutoencoderKLWan, encoder: PatchEncoder, clips: int = 8, frames: int = 9, seed: int = 999
) -> float:
    """Mean PSNR in dB of decoded latents, peak to peak 2, over clips of a fixed seed."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(clips):
        clip = drawn_batch(rng, frames, 1)
        error = (clip - decode(vae, encoder(clip)).clamp(-1, 1)).square().mean().item()
        values.append(10 * math.log10(4 / error))
    return float(np.mean(values))


def _edges(a: Tensor, b: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels."""
    return (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean() + (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()


def pixel_loss(clips: Tensor, shown: Tensor) -> Tensor:
    """L1 + L1 of gradients + MSE."""
    error = clips - shown
    return error.abs().mean() + _edges(clips, shown) + error.square().mean()


def _split(modules: list[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Kernels for Muon; gains, biases and the layers next to pixels and latents for AdamW."""
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            wide = parameter.ndim >= 2 and parameter.shape[0] > 3 and parameter[0].numel() >= 4
            inner = not any(part in name for part in ("gamma", "conv_in", "conv_out"))
            (kernels if wide and inner else others).append(parameter)
    return kernels, others


def train(
    encoder: PatchEncoder,
    path: Path,
    minutes: float,
    *,
    resume: bool = False,
    rate: float = 0.015,
    seed: int = 0,
    log: Log = print,
) -> None:
    """Train the decoder for the latents of `encoder`, at least one step; its average goes to `path`.

    Noise of up to a tenth of the latents' deviation stands for the backbone's errors. Muon with a linear
    decay. `resume` starts from the state at `path`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build()
    if resume:
        model.load_state_dict(torch.load(path, weights_only=True))
    average = copy.deepcopy(model)
    model.requires_grad_(False)
    parts: list[nn.Module] = [model.decoder, model.post_quant_conv]
    for part in parts:
        part.requires_grad_(True)
    kernels, others = _split(parts)
    muon = Muon(kernels, rate)
    adam = torch.optim.AdamW(others, 2e-3, betas=(0.9, 0.98), weight_decay=0)
    start = saved = time.monotonic()
    step, total = 0, 0.0
    while (done := (time.monotonic() - start) / (minutes * 60)) < 1 or step == 0:
        pace = min(1.0, (step + 1) / 50) * max(0.01, 1 - done)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate * pace, 2e-3 * pace
        clips = drawn_batch(rng, 9, 2)
        latents = encoder(clips)
        amount = torch.rand(len(clips), 1, 1, 1, 1) * 0.1
        loss = pixel_loss(clips, decode(model, latents + torch.randn_like(latents) * amount))
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        step, total = step + 1, total + loss.item()
        follow(average, model, min(0.995, step / (step + 10)))
        if step % 100 == 0:
            log(f"vae {done * minutes:6.1f} min, step {step}: loss {total / 100:.4f}")
            total = 0.0
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            torch.save(average.state_dict(), path)
            log(f"vae PSNR {psnr(average, encoder):.2f} dB")
    torch.save(average.state_dict(), path)
    log(f"vae done after {step} steps: PSNR {psnr(average, encoder):.2f} dB")
