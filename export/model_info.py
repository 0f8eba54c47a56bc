"""model.json: what a checkpoint's own files do not say of it, such as its size, its memory and its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swiftvideo.runtime.errors import CheckpointError, SettingsError
from swiftvideo.runtime.geometry import PolicySettings
from swiftvideo.runtime.plain import PlainError, decode

from .models.schedule import DENOISING_INDICES, Schedule


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """model.json: sizes in pixels, frames of the memory and steps, with the published model's as defaults."""

    name: str = "model"
    """The checkpoint folder's where model.json has none."""
    height: int = 480
    width: int = 832
    fps: int = 16
    text_len: int = 512
    window: int = 12
    sink: int = 3
    chunk: int = 3
    max_anchors: int = 4
    shift: float = 5.0
    context_noise: float = 0.0
    steps: tuple[int, ...] = DENOISING_INDICES
    """Indices of the denoising steps, 1..1000, falling."""
    latents_mean: tuple[float, ...] | None = None
    """Per channel; None takes the VAE's config."""
    latents_std: tuple[float, ...] | None = None
    policy: PolicySettings = field(default_factory=PolicySettings)

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise SettingsError(f"name is {self.name!r}: printable characters are needed")
        if self.policy.anchors.max > self.max_anchors:
            raise SettingsError(
                f"policy.anchors.max is {self.policy.anchors.max} and max_anchors is {self.max_anchors}: raise "
                "max_anchors or lower the policy's"
            )
        _ = self.schedule  # checks itself

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return Schedule(self.shift, self.steps, self.context_noise)

    @classmethod
    def parse(cls, content: Mapping[str, Any], source: str) -> ModelInfo:
        """From model.json's content. Raises CheckpointError for unknown keys, wrong types and values out of range."""
        try:
            return decode(cls, content, source)
        except PlainError as error:
            raise CheckpointError(str(error)) from error
        except SettingsError as error:
            raise CheckpointError(f"{source}: {error}") from error


def plain_name(text: str) -> str:
    """A name of letters, digits and `-_.` alone, for files and manifests."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
