"""The video autoencoder of the embedded model: diffusers' AutoencoderKLWan, small, and its training.

diffusers runs this class one latent frame at a time through a feature cache. Training needs one
differentiable pass over a whole clip; called without a cache the class leaves out the resampling in time.
`whole_sequence` corrects that.
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
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn

from . import scenes
from .optim import Muon, follow

CHANNELS = 16
Log = Callable[[str], None]


def build(base: int = 8, multipliers: tuple[int, ...] = (1, 2, 2, 4)) -> AutoencoderKLWan:
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
    with torch.no_grad():
        vae.quant_conv.bias[CHANNELS:] = -5  # log-variance: start with little noise
    return whole_sequence(vae)


def whole_sequence(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Make `vae.encoder(x)` and `vae.decoder(z)` without a cache equal what the cached calls give."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            cached = module.forward
            # Bound on the instance: the class, and so any other model in the process, stays as it is.
            module.forward = types.MethodType(_whole_resample(cached), module)
    return vae


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
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        if self.mode == "downsample3d" and x.shape[2] > 1:  # of the others every two become one
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x

    return forward


def encode(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """clips [B,3,1+4k,H,W] in -1..1 -> mean and log-variance, [B,16,1+k,H/8,W/8] each."""
    mean, logvar = vae.quant_conv(vae.encoder(clips)).chunk(2, dim=1)
    return mean, logvar


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """latents [B,16,1+k,h,w] -> clips [B,3,1+4k,8h,8w], about -1..1."""
    clips: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clips


def drawn_batch(rng: np.random.Generator, frames: int, side: int, count: int) -> Tensor:
    """`count` clips of `frames` frames, randomly cropped: float32 [count,3,frames,side,side] in -1..1."""
    clips = []
    for _ in range(count):
        clip = scenes.clip(rng, frames)
        if side < scenes.SIDE:
            y, x = rng.integers(0, scenes.SIDE + 1 - side, 2)
            clip = clip[:, y : y + side, x : x + side]
        clips.append(clip)
    return to_model(np.stack(clips))


def to_model(clips: scenes.Frames) -> Tensor:
    """float32 [B,T,H,W,3] in 0..255 -> [B,3,T,H,W] in -1..1."""
    return (torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 127.5 - 1).contiguous()


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: int = 6, frames: int = 9, seed: int = 999) -> float:
    """Mean PSNR in dB of decoded means, peak to peak 2, over clips of a fixed seed."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(clips):
        clip = drawn_batch(rng, frames, scenes.SIDE, 1)
        error = (clip - decode(vae, encode(vae, clip)[0]).clamp(-1, 1)).square().mean().item()
        values.append(10 * math.log10(4 / error))
    return float(np.mean(values))


def _edges(a: Tensor, b: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels."""
    return (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean() + (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()


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
    vae: AutoencoderKLWan, path: Path, minutes: float, *, rate: float = 0.015, seed: int = 0, log: Log = print
) -> None:
    """Train the whole autoencoder for `minutes` of wall clock and write its state to `path`.

    Loss: L1 + L1 of gradients + MSE + 1e-4 KL; Muon with a linear decay. Clips grow from 1 to 5 to 9 frames.
    """

    def loss_at(done: float) -> Tensor:
        if done >= 0.4:
            clips = drawn_batch(rng, 9, 48, 2)
        elif done >= 0.12:
            clips = drawn_batch(rng, 5, 48, 2)
        else:
            clips = drawn_batch(rng, 1, scenes.SIDE, 6)
        mean, logvar = encode(vae, clips)
        logvar = logvar.clamp(-12, 2)
        shown = decode(vae, mean + torch.randn_like(mean) * (0.5 * logvar).exp())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return _pixels(clips, shown, 1.0) + 1e-4 * kl

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    parts: list[nn.Module] = [vae.encoder, vae.quant_conv, vae.decoder, vae.post_quant_conv]
    _descend(vae, parts, loss_at, path, minutes, (rate, 2e-3), log, average=None)


def train_decoder(
    vae: AutoencoderKLWan, path: Path, minutes: float, *, rate: float = 0.01, seed: int = 1, log: Log = print
) -> None:
    """Train the decoder alone, for the encoder that the backbone's latents come from; write its mean to `path`.

    Noise of 4 % of the latents' deviation stands for the backbone's errors.
    """

    def loss_at(done: float) -> Tensor:
        clips = drawn_batch(rng, 9, scenes.SIDE, 1)
        with torch.no_grad():
            mean, _ = encode(vae, clips)
        return _pixels(clips, decode(vae, mean + torch.randn_like(mean) * spread * 0.04), 2.0)

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        spread = encode(vae, drawn_batch(rng, 9, scenes.SIDE, 8))[0].std((0, 2, 3, 4), keepdim=True)
    vae.requires_grad_(False)
    parts: list[nn.Module] = [vae.decoder, vae.post_quant_conv]
    for part in parts:
        part.requires_grad_(True)
    _descend(vae, parts, loss_at, path, minutes, (rate, 1e-3), log, average=copy.deepcopy(vae))


def _pixels(clips: Tensor, shown: Tensor, squares: float) -> Tensor:
    error = clips - shown
    return error.abs().mean() + _edges(clips, shown) + squares * error.square().mean()


def _descend(
    vae: AutoencoderKLWan,
    parts: list[nn.Module],
    loss_at: Callable[[float], Tensor],
    path: Path,
    minutes: float,
    rates: tuple[float, float],
    log: Log,
    average: AutoencoderKLWan | None,
) -> None:
    """Minimise `loss_at(share of the time gone)`; `rates` of Muon and AdamW decay linearly."""
    kernels, others = _split(parts)
    muon = Muon(kernels, rates[0])
    adam = torch.optim.AdamW(others, rates[1], betas=(0.9, 0.98), weight_decay=0)
    result = vae if average is None else average
    start = saved = time.monotonic()
    step, total = 0, 0.0
    while (done := (time.monotonic() - start) / (minutes * 60)) < 1:
        pace = min(1.0, (step + 1) / 50) * max(0.02, 1 - done)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rates[0] * pace, rates[1] * pace
        loss = loss_at(done)
        vae.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        step, total = step + 1, total + loss.item()
        if average is not None:
            follow(average, vae, min(0.99, step / (step + 10)))
        if step % 100 == 0:
            log(f"vae {done * minutes:6.1f} min, step {step}: loss {total / 100:.4f}")
            total = 0.0
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            torch.save(result.state_dict(), path)
            log(f"vae PSNR {psnr(result):.2f} dB, single frames {psnr(result, frames=1):.2f} dB")
    torch.save(result.state_dict(), path)
    log(f"vae done after {step} steps: PSNR {psnr(result):.2f} dB")
