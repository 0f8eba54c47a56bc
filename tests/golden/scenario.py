"""Recorded runs of the authors' code: what a folder of them holds, and what it asks of us.

The format is described in data/README.md. SWIFTVIDEO_GOLDEN names another folder of the same format.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.geometry import (
    AnchorSettings,
    BridgeSettings,
    Geometry,
    PolicySettings,
    WindowSettings,
)

FOLDER = Path(os.environ.get("SWIFTVIDEO_GOLDEN", Path(__file__).parent / "data"))
SCENARIOS = sorted(path for path in FOLDER.glob("scn_*.npz") if not path.stem.endswith("_caches"))

IGNORED = {"model_name"}
"""Arguments that change nothing here."""

# An argument belongs to the first group whose prefix it starts with, and in it to the first setting one of whose words
# it contains. So other spellings of the same settings are understood, and anything else is an error.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "adaptive_prompt_window": {
        "enabled": ("enabled",),
        "min_size": ("min",),
        "tau_post": ("post",),
        "tau_pre": ("pre",),
    },
    "segment_anchor": {
        "enabled": ("enabled",),
        "recent": ("recent",),
        "max": ("max",),
        "mix": ("mix",),
        "scale": ("scale",),
    },
    "semantic_bridge": {
        "enabled": ("enabled",),
        "recent": ("recent",),
        "micro": ("micro",),
        "tau_low": ("low",),
        "tau_high": ("high",),
        "decay": ("decay",),
        "scale": ("scale", "strength"),
    },
}
PLAIN = {
    "denoising_step_list",
    "warp_denoising_step",
    "num_frame_per_block",
    "model_kwargs",
    "context_noise",
    "global_sink",
}
MODEL_KWARGS = {"local_attn_size", "timestep_shift", "sink_size"}
MODEL = {
    "model_type", "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads",
    "num_layers", "qk_norm", "cross_attn_norm", "eps",
}  # fmt: skip


def grouped(args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of each group by our names. Raises KeyError for one that nothing here understands."""
    found: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in args.items():
        if key in PLAIN or key in IGNORED:
            continue
        group = next((name for name in GROUPS if key.startswith(name)), None)
        rest = "" if group is None else key.removeprefix(group)
        names = [
            name for name, words in GROUPS[group or "segment_anchor"].items() if any(w in rest for w in words)
        ]
        if group is None or not names:
            raise KeyError(
                f"the argument {key!r} = {value!r} is not understood: teach tests/golden/scenario.py"
            )
        found[group][names[0]] = value
    return found


@dataclass(frozen=True)
class Scenario:
    """One scn_<name>.npz."""

    path: Path

    @cached_property
    def data(self) -> dict[str, NDArray[Any]]:
        """All arrays."""
        with np.load(self.path) as file:
            return {name: file[name] for name in file.files}

    @cached_property
    def caches(self) -> dict[str, NDArray[Any]]:
        """Arrays of scn_<name>_caches.npz, or nothing."""
        path = self.path.with_name(f"{self.path.stem}_caches.npz")
        if not path.exists():
            return {}
        with np.load(path) as file:
            return {name: file[name] for name in file.files}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the reference was given."""
        config: dict[str, Any] = json.loads(str(self.data["config_json"]))
        return config

    @property
    def args(self) -> dict[str, Any]:
        """The reference's arguments."""
        args: dict[str, Any] = self.config["args"]
        return args

    @property
    def batch(self) -> int:
        """B."""
        return int(self.data["noise"].shape[0])

    @property
    def model(self) -> dict[str, Any]:
        """The backbone's sizes, all of them understood."""
        model: dict[str, Any] = self.config["model"]
        if unknown := set(model) - MODEL:
            raise KeyError(f"model keys {sorted(unknown)} are not understood: teach tests/golden/scenario.py")
        if not (model["qk_norm"] and model["cross_attn_norm"]) or model["model_type"] != "t2v":
            raise KeyError(f"this model is of another kind: {model}")
        return model

    @property
    def weights(self) -> Path:
        """The backbone's state dict."""
        return self.path.with_name(self.config["weights"])

    @cached_property
    def settings(self) -> PolicySettings:
        """The policy. Absent keys are the published code's defaults (algorithm.md, section 9)."""
        groups = grouped(self.args)
        window = {"min_size": None, "tau_post": None, "tau_pre": None} | groups["adaptive_prompt_window"]
        anchors = {"recent": None} | groups["segment_anchor"]
        return PolicySettings(
            policy="swift",
            positions="absolute",
            global_sink=bool(self.args.get("global_sink", False)),
            bridge=BridgeSettings(**groups["semantic_bridge"]),
            window=WindowSettings(**window),
            anchors=AnchorSettings(**anchors),
        )

    @cached_property
    def geometry(self) -> Geometry:
        """Shapes."""
        model, kwargs = self.model, self.args["model_kwargs"]
        if unknown := set(kwargs) - MODEL_KWARGS:
            raise KeyError(
                f"model_kwargs {sorted(unknown)} are not understood: teach tests/golden/scenario.py"
            )
        height, width = self.config["latent_hw"]
        return Geometry(
            layers=model["num_layers"],
            heads=model["num_heads"],
            head_dim=model["dim"] // model["num_heads"],
            latent_channels=model["in_dim"],
            latent_height=height,
            latent_width=width,
            text_len=model["text_len"],
            text_dim=model["text_dim"],
            patch=tuple(model["patch_size"]),
            window=kwargs["local_attn_size"],
            sink=kwargs.get("sink_size", 0),
            chunk=self.args["num_frame_per_block"],
            max_anchors=self.settings.anchors.max,
            steps=len(self.denoising_steps),
        )

    @property
    def denoising_steps(self) -> tuple[int, ...]:
        """Indices into the schedule."""
        if not self.args["warp_denoising_step"]:
            raise KeyError(
                "warp_denoising_step false is not supported: the steps would be times, not indices"
            )
        return tuple(self.args["denoising_step_list"])

    @property
    def shift(self) -> float:
        """Of the schedule."""
        return float(self.args["model_kwargs"].get("timestep_shift", 5.0))

    @property
    def context_noise(self) -> float:
        """Time of the context pass."""
        return float(self.args.get("context_noise", 0))

    @cached_property
    def switch_frames(self) -> list[int]:
        """Nominal latent frames of the switches."""
        frames: list[int] = self.data["switch_frame_indices"].reshape(-1).tolist()
        return frames

    def embeds(self, segment: int) -> NDArray[np.float32]:
        """Text embeddings [B,text_len,text_dim] of a segment."""
        rows = self.data["prompt_table"][self.data["prompt_ids"][segment]]
        return np.ascontiguousarray(np.broadcast_to(rows, (self.batch, *rows.shape[1:])), np.float32)

    def draw(self, chunk: int, step: int) -> NDArray[np.float32]:
        """Noise as the recorded run drew it (`NoiseSource`)."""
        g, noise = self.geometry, self.data["noise"]
        if step == 0:
            return np.ascontiguousarray(noise[:, chunk * g.chunk : (chunk + 1) * g.chunk])
        drawn = self.data["renoise"][chunk * (g.steps - 1) + step - 1]
        return drawn.reshape(self.batch, g.chunk, *drawn.shape[1:])
