"""Training of the backbone: rectified flow with teacher forcing on encoded stories."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from swiftvideo.export.models.schedule import Schedule

from . import latents as data, teacher_forcing as forcing
from .network import Network
from .optim import Muon, follow
from .prompts import Attributes

BATCH = 6
CLEAN, NOISY = 3, 4
"""Chunks of a sample: the noisy ones are chunks 0 to 3, the clean ones 0 to 2."""
SHIFT = 5.0


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input; frames are latent frames. B samples of 3 clean and 4 noisy chunks."""

    latents: Tensor
    """[B,21,16,8,8], clean frames first."""
    target: Tensor
    """Flow of the noisy frames, [B,12,16,8,8]."""
    t: Tensor
    """[B,21] in 0..1000; 0 for clean frames."""
    sentences: list[str]
    """B * 4, the prompts of the chunks."""
    recached: Tensor
    """Samples whose clean chunks carry the newest prompt, as after a full recache: bool [B]."""
    mask: Tensor
    """bool [B,Q,M+Q]."""
    weights: Tensor
    """Weight of each noisy chunk in the loss, [B,4]."""


class Sampler:
    """Draws batches from encoded stories; everything random comes from one seed."""

    def __init__(self, latents: Tensor, attributes: Tensor, seed: int) -> None:
        self._latents, self._attributes = latents, attributes.numpy()
        self._rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._steps = torch.tensor(Schedule().pass_sigmas[:-1])
        self._tokens = forcing.CHUNK * latents.shape[-2] * latents.shape[-1] // 4

    def batch(self, size: int = BATCH) -> Batch:
        """The next batch. Half of the samples pair the sink with a stretch that begins later in the video."""
        rng, g = self._rng, self.generator
        rows = rng.integers(0, len(self._latents), size)
        starts = [0 if rng.random() < 0.5 else int(rng.integers(0, data.CHUNKS - NOISY + 1)) for _ in rows]
        frames = [np.r_[0:3, 3 + 3 * start : 12 + 3 * start] for start in starts]
        x = torch.stack([self._latents[row][frame] for row, frame in zip(rows, frames, strict=True)])
        chunks = [[0, 1 + start, 2 + start, 3 + start] for start in starts]
        sentences = [
            Attributes.from_indices(*self._attributes[row, chunk].tolist()).prompt(rng)
            for row, each in zip(rows, chunks, strict=True)
            for chunk in each
        ]
        weights = torch.ones(size, NOISY)
        weights[torch.tensor(starts) > 0, 1] = 0  # after a jump the second chunk cannot be predicted
        sigma = self._sigmas(size).repeat_interleave(forcing.CHUNK, 1)
        noise = torch.randn(x.shape, generator=g)
        mixed = x.lerp(noise, sigma[..., None, None, None])
        noisy_rows = torch.rand(size, CLEAN, generator=g) < 0.7
        amount = torch.rand(size, CLEAN, generator=g) * 0.1 * noisy_rows
        amount = amount.repeat_interleave(forcing.CHUNK, 1)[..., None, None, None]
        clean = x[:, : CLEAN * forcing.CHUNK]
        clean = clean.lerp(torch.randn(clean.shape, generator=g), amount)
        masks = [self._mask() for _ in range(size)]
        return Batch(
            latents=torch.cat([clean, mixed], 1),
            target=noise - x,
            t=torch.cat([torch.zeros(size, CLEAN * forcing.CHUNK), 1000 * sigma], 1),
            sentences=sentences,
            recached=torch.rand(size, generator=g) < 0.15,
            mask=torch.stack(masks),
            weights=weights,
        )

    def memory(self, size: int) -> forcing.Memory:
        """Memory tokens for one step."""
        return forcing.memory_tokens(self._tokens, size, self.generator)

    def _sigmas(self, size: int) -> Tensor:
        """Half exactly the inference steps, half continuous with the same shift: [size,4]."""
        g, shape = self.generator, (size, NOISY)
        steps = self._steps[torch.randint(0, len(self._steps), shape, generator=g)]
        u = torch.rand(shape, generator=g)
        continuous = SHIFT * u / (1 + (SHIFT - 1) * u)
        chosen = torch.where(torch.rand(shape, generator=g) < 0.5, steps, continuous)
        return chosen.clamp(min=0.005)

    def _mask(self) -> Tensor:
        whole = 2 * self._tokens  # what window 12 leaves beside the sink and the own chunk
        visible = whole if self._rng.random() < 0.4 else int(self._rng.integers(8, whole + 1))
        memory = bool(self._rng.random() < 0.5)
        return forcing.block_mask(CLEAN, range(NOISY), visible, self._tokens, memory=memory)


def errors(network: Network, batch: Batch, memory: forcing.Memory) -> Tensor:
    """Squared flow error of each noisy chunk, [B,4]."""
    size = len(batch.latents)
    embeds = network.embeds(batch.sentences).unflatten(0, (size, NOISY))
    clean = torch.where(batch.recached[:, None, None, None], embeds[:, NOISY - 1 :], embeds[:, :CLEAN])
    embeds = torch.cat([clean, embeds], 1)
    split = CLEAN * forcing.CHUNK
    frames = torch.cat([torch.arange(split), torch.arange(NOISY * forcing.CHUNK)])
    flow = forcing.forward(network.wan, batch.latents, batch.t, frames, embeds, batch.mask, memory)
    squares = (flow[:, split:] - batch.target).square()
    error: Tensor = squares.unflatten(1, (NOISY, -1)).flatten(2).mean(-1)
    return error


def train(
    stories: Path,
    path: Path,
    minutes: float,
    *,
    resume: bool = False,
    rate: float = 0.02,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Train for `minutes` of wall clock on what `latents.make` wrote; the state goes to `path`.

    The state holds `ema` and `net` (Network), `mean` and `std` [16]. `resume` starts from the state at
    `path`.
    """
    torch.manual_seed(seed)
    x, attributes = data.load(stories)
    network = Network()
    mean, std = data.statistics(x)
    if resume:
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["ema"])
        mean, std = state["mean"], state["std"]
    sampler = Sampler((x - mean[:, None, None]) / std[:, None, None], attributes, seed)
    matrices = [p for p in network.wan.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in chosen]
    muon = Muon(matrices, rate)
    adam = torch.optim.AdamW(others, 1.5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    average = copy.deepcopy(network)

    def save() -> None:
        torch.save({"ema": average.state_dict(), "net": network.state_dict(), "mean": mean, "std": std}, path)

    start = saved = time.monotonic()
    step, totals, counts = 0, torch.zeros(NOISY), torch.zeros(NOISY)
    while (done := (time.monotonic() - start) / (minutes * 60)) < 1:
        pace = min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - done) / 0.6))
        muon.param_groups[0]["lr"] = rate * pace
        adam.param_groups[0]["lr"] = 1.5e-3 * pace * rate / 0.02
        batch = sampler.batch()
        error = errors(network, batch, sampler.memory(BATCH)) * batch.weights
        network.zero_grad(set_to_none=True)
        torch.autograd.backward(error.sum() / batch.weights.sum())
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        step += 1
        follow(average, network, min(0.998, step / (step + 20)))
        totals, counts = totals + error.detach().sum(0), counts + batch.weights.sum(0)
        if step % 100 == 0:
            each = " ".join(f"{value:.4f}" for value in (totals / counts.clamp(min=1)).tolist())
            log(f"backbone {done * minutes:6.1f} min, step {step}: loss of chunks 0 to 3: {each}")
            totals, counts = torch.zeros(NOISY), torch.zeros(NOISY)
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            save()
    save()
    log(f"backbone done after {step} steps")
