"""The GPU's engine on the CPU with its real kernels, in Triton's interpreter, beside the reference: errors as JSON.

A program, not a test: Triton decides when it is imported whether it interprets (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from swiftvideo.export.cuda import CudaEngine
from swiftvideo.export.kernels.attention import dynamic_window_attention
from swiftvideo.export.kernels.compiler import block_width
from swiftvideo.export.kernels.injection import semantic_injection
from swiftvideo.export.kernels.rows import place_rows
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime.geometry import BridgeSettings, PolicySettings
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.plugins.split import Phase, Split
from swiftvideo.runtime.rollout import Rollout
from tests.export import small

BLOCK = 16
FUNCTIONS: dict[str, Any] = {
    "DynamicWindowAttention": dynamic_window_attention,
    "SemanticInjection": semantic_injection,
    "PlaceRows": place_rows,
}
launched: dict[str, int] = dict.fromkeys(FUNCTIONS, 0)


class Pieces(Split):
    """The last tiles in three pieces each, for which so few keys give no cause."""

    def phases(self, queries: int, heads: int, batch: int, rows: int) -> list[Phase]:
        tiles = self.tiles(queries, heads, batch)
        return self.divided(tiles, max(1, tiles % self.slots), 3)


class Interpreted(CudaEngine):
    """An engine that launches into the interpreter: same arguments in the same order, tensors for their addresses."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more, rehearse=True)
        self.launchers = FUNCTIONS
        tile = BLOCK, BLOCK, block_width(self.geometry.head_dim), 8
        self.split = Pieces(*tile, slots=4)
        self.partial = torch.full((64 * BLOCK * (tile[2] + 2),), float("nan"))

    def launch(self, op: str, sizes: dict[str, int], *arguments: Any) -> None:
        for value in arguments:
            assert not isinstance(value, torch.Tensor) or value.is_contiguous()
        head = self.geometry.head_dim
        constants = {"HEAD": head, "BLOCK_D": block_width(head)}
        grid: tuple[int, ...]
        if op == "DynamicWindowAttention":
            grid = (sizes["programs"],)
            constants |= {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "MERGED": 8}
        elif op == "SemanticInjection":
            grid = (sizes["heads"], sizes["batch"], sizes["layers"])
            constants |= {"BLOCK_R": BLOCK}
        else:
            grid = (-(-sizes["count"] // BLOCK), sizes["heads"], sizes["items"])
            constants |= {"BLOCK_R": BLOCK}
        FUNCTIONS[op][grid](*arguments, **constants)
        launched[op] += 1


def run(engine: TorchEngine) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Latents of six chunks with a bridge at the second, and the session's state."""
    g = engine.geometry
    embeds = np.random.default_rng(1).standard_normal((2, 1, g.text_len, g.text_dim)).astype(np.float32)
    prompts = [engine.condition(value) for value in embeds]
    settings = PolicySettings(bridge=BridgeSettings(tau_low=2.0, tau_high=2.0))
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    rollout = Rollout(engine, settings, prompts[0], PhiloxNoise(4, shape))
    rollout.ask(prompts[1], g.chunk)
    latents = [rollout.advance().latents for _ in range(6)]
    return latents, rollout.tensors.export_state()


def main() -> None:
    torch.set_num_threads(1)
    made = []
    for kind in (TorchEngine, Interpreted):
        source = small.checkpoint()
        made.append(run(kind(source.backbone, source.geometry(), source.schedule, device="cpu")))
    (theirs, kept), (ours, state) = made
    errors = {
        f"chunk {i}": float(np.abs(a - b).max()) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    }
    errors |= {name: float(np.abs(state[name] - value).max()) for name, value in kept.items()}
    print(json.dumps({"errors": errors, "launched": launched}))


if __name__ == "__main__":
    main()
