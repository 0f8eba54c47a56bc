"""The engine beside a plain torch loop of the same model, in one run, on the same weights and the same noise.

    python -m tests.bench.naive [--checkpoint FOLDER] [--chunks 20] [--threads N] [--json FILE]

The plain loop does what algorithm.md, section 10, says of the published code: it clones the K and V of every layer in
every forward, rotates in complex128, runs the text MLP in every forward and throws the context pass's output away. Both
sides do the same work: the whole window, no switch, absolute positions. Their latents are compared, so that the ratio
is one of equal results. Without --checkpoint the weights are random, in the embedded model's architecture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from swiftvideo.export.bundle import export_bundle
from swiftvideo.export.checkpoint import Checkpoint, load_checkpoint
from swiftvideo.runtime import AnchorSettings, BridgeSettings, PolicySettings, WindowSettings, load
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.tokenizer import PromptTokenizer
from swiftvideo.sdk.machine import describe

PROMPT = "a red circle moving right at night"
SEED = 7
WARM_UP = 6
LAST_FRAME = 1024
"""Rotations are looked up in a table of this many latent frames."""
PLAIN = PolicySettings(
    positions="absolute",
    bridge=BridgeSettings(enabled=False),
    window=WindowSettings(enabled=False),
    anchors=AnchorSettings(enabled=False),
)


class NaiveLoop:
    """One video, chunk by chunk, in eager PyTorch. Slots of the cache are kept in the order of time."""

    def __init__(self, checkpoint: Checkpoint, prompt: str, seed: int) -> None:
        self.model, self.vae = checkpoint.backbone, checkpoint.vae
        self.g = g = checkpoint.geometry()
        passes = checkpoint.schedule
        self.times, self.sigmas = passes.passes.tolist(), passes.pass_sigmas.tolist()
        self.noise = PhiloxNoise(seed, (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width))
        ids, mask = PromptTokenizer(checkpoint.tokenizer, g.text_len).encode(prompt)
        self.embeds = checkpoint.text_encoder(torch.from_numpy(ids), torch.from_numpy(mask)).float()
        self.cross = self.model.cross_kv(self.model.embed_text(self.embeds))
        self.rotations = self._rotations()
        shape = (1, g.window * g.frame_tokens, g.heads, g.head_dim)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(g.layers)]
        self.filled = self.end = self.index = 0
        self.vae_cache: list[Tensor] | None = None

    def _rotations(self) -> Tensor:
        """complex128 [LAST_FRAME, P, d/2]: time, row and column (algorithm.md, 2.7)."""
        g = self.g
        rows, columns = g.latent_height // g.patch[1], g.latent_width // g.patch[2]
        half, third = g.head_dim // 2, g.head_dim // 2 // 3

        def angles(count: int, pairs: int) -> Tensor:
            frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
            return torch.outer(torch.arange(count, dtype=torch.float64), frequencies)

        grid = (LAST_FRAME, rows, columns, -1)
        parts = (
            angles(LAST_FRAME, half - 2 * third)[:, None, None].expand(grid),
            angles(rows, third)[None, :, None].expand(grid),
            angles(columns, third)[None, None].expand(grid),
        )
        turned = torch.cat(parts, -1).flatten(1, 2)
        return torch.polar(torch.ones_like(turned), turned)

    def forward(self, latents: Tensor, time: float, start: int) -> Tensor:
        """Flow of latents [1,F,C,h,w] at `time`; writes the cache (algorithm.md, section 3)."""
        g, model = self.g, self.model
        frames = latents.shape[1]
        new, sink, capacity = frames * g.frame_tokens, g.sink * g.frame_tokens, g.window * g.frame_tokens
        end = start * g.frame_tokens + new
        evicted = max(0, new + self.filled - capacity) if end > self.end else 0
        stop = self.filled + end - self.end - evicted
        e, e0 = model.time_embed(torch.full((1, frames), time))
        model.embed_text(self.embeds)  # in every forward, though only its keys and values are used
        turn = self.rotations[start : start + frames].reshape(1, new, 1, -1)
        cloned = [(k.clone(), v.clone()) for k, v in self.cache]
        x = model.embed_patches(latents).unflatten(1, (frames, -1))
        for layer, block in enumerate(model.layers):
            m = block.modulations(e0)
            y = functional.layer_norm(x, x.shape[-1:], eps=block.eps) * (1 + m[1]) + m[0]
            y = y.flatten(1, 2)
            attention = block.self_attn
            q, k = _turned(attention.query(y), turn), _turned(attention.key(y), turn)
            keys, values = cloned[layer]
            for slots, fresh in ((keys, k), (values, attention.value(y))):
                if evicted:
                    slots[:, sink : self.filled - evicted] = slots[:, sink + evicted : self.filled].clone()
                slots[:, stop - new : stop] = fresh
            recent = slice(max(sink, stop - (capacity - sink)), stop)
            seen_k = torch.cat((keys[:, :sink], keys[:, recent]), 1)
            seen_v = torch.cat((values[:, :sink], values[:, recent]), 1)
            x, q = block.after_self(x, _attend(q, seen_k, seen_v), e0)
            x = block.after_cross(x, _attend(q, self.cross[0][layer], self.cross[1][layer]), e0)
        self.cache, self.filled, self.end = cloned, stop, max(end, self.end)
        rows, columns = g.latent_height // g.patch[1], g.latent_width // g.patch[2]
        return model.unpatch(model.head(x, e), rows, columns)

    @torch.no_grad()
    def latents(self) -> Tensor:
        """The next chunk, [1,c,C,h,w]."""
        start = self.index * self.g.chunk
        x = torch.from_numpy(self.noise.draw(self.index, 0))
        for step in range(self.g.steps):
            flow = self.forward(x, self.times[step], start)
            x0 = (x.double() - self.sigmas[step] * flow.double()).float()
            if step + 1 < self.g.steps:
                sigma = self.sigmas[step + 1]
                x = (1 - sigma) * x0 + sigma * torch.from_numpy(self.noise.draw(self.index, step + 1))
        self.forward(x0, self.times[-1], start)
        self.index += 1
        return x0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> int:
        """Decode the next latents; returns how many frames they gave."""
        count = 0
        if self.vae_cache is None:
            frames, self.vae_cache = self.vae.decode_first(latents[:, :1])
            count, latents = frames.shape[1], latents[:, 1:]
        frames, self.vae_cache = self.vae.decode(latents, self.vae_cache)
        return count + frames.shape[1]


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def untrained_checkpoint(folder: Path) -> Path:
    """A checkpoint of the embedded model's architecture with random weights."""
    from swiftvideo.export.toy import vae
    from swiftvideo.export.toy.checkpoint import save_checkpoint
    from swiftvideo.export.toy.network import CONFIG, Network

    torch.manual_seed(0)
    network = Network()
    torch.nn.init.normal_(network.wan.head.head.weight, std=CONFIG.dim**-0.5)  # it starts at zero
    save_checkpoint(
        folder,
        backbone=network.wan.state_dict(),
        config={name: getattr(CONFIG, name) for name in CONFIG.__slots__},
        vae=vae.build(),
        text_encoder=network.text,
        mean=torch.zeros(vae.CHANNELS),
        std=torch.ones(vae.CHANNELS),
    )
    return folder


def timed(chunks: int, latents: Callable[[], Any], decode: Callable[[Any], int]) -> dict[str, float]:
    """Medians over `chunks` after the warm-up: milliseconds of both parts, frames per second with and without."""
    denoising, decoding, frames = [], [], 0
    for index in range(WARM_UP + chunks):
        begin = time.perf_counter()
        made = latents()
        middle = time.perf_counter()
        count = decode(made)
        if index >= WARM_UP:
            denoising.append(middle - begin)
            decoding.append(time.perf_counter() - middle)
            frames = count
    latent_s, decode_s = float(np.median(denoising)), float(np.median(decoding))
    return {
        "latents_ms": latent_s * 1000,
        "decode_ms": decode_s * 1000,
        "fps_without_vae": frames / latent_s,
        "fps_with_vae": frames / (latent_s + decode_s),
    }


def compare(folder: Path, chunks: int, threads: int) -> dict[str, Any]:
    """Figures of both sides and their ratios."""
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(folder)
    naive = NaiveLoop(checkpoint, PROMPT, SEED)
    made: list[Tensor] = []

    def keep() -> Tensor:
        made.append(naive.latents())
        return made[-1]

    slow = timed(chunks, keep, naive.decode)
    with tempfile.TemporaryDirectory() as place:
        export_bundle(checkpoint, Path(place) / "bundle")
        with load(Path(place) / "bundle", threads=threads) as pipeline:
            with pipeline.session(PROMPT, SEED, PLAIN) as session:
                rollout = session._rollout
                steps: list[Any] = []

                def advance() -> Any:
                    steps.append(rollout.advance().latents)
                    return steps[-1]

                fast = timed(chunks, advance, lambda latents: rollout.tensors.decode(latents).shape[1])
    error = max(
        float(np.abs(a.numpy() - b).max() / np.abs(b).max()) for a, b in zip(made, steps, strict=True)
    )
    ratios = {key: fast[key] / slow[key] for key in ("fps_without_vae", "fps_with_vae")}
    return {
        **describe(),
        "model": checkpoint.info.name,
        "weights": checkpoint.sha256,
        "threads": threads,
        "chunks": chunks,
        "naive": slow,
        "swiftvideo": fast,
        "ratio": ratios,
        "largest_relative_difference": error,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--threads", type=int, default=describe()["machine"]["cores"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.checkpoint or untrained_checkpoint(Path(place))
        result = compare(folder, options.chunks, options.threads)
    table = Table(
        *("", "latents ms", "decode ms", "fps without VAE", "fps with VAE"),
        title=f"{result['model']}, chunks of 12 frames, {options.threads} threads, {result['machine']['cpu']}",
    )
    for name in ("naive", "swiftvideo"):
        row = result[name]
        table.add_row(name, *(f"{row[key]:.1f}" for key in row))
    table.add_row("ratio", "", "", *(f"{value:.2f}" for value in result["ratio"].values()))
    console = Console()
    console.print(table)
    console.print(f"largest relative difference of the latents: {result['largest_relative_difference']:.1e}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
