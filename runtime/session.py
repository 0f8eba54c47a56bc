"""One endless video: prompts in, chunks of frames out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, Float32, Prompt
from .errors import ClosedError, UsageError
from .geometry import Geometry, PolicySettings
from .noise import PhiloxNoise
from .rollout import Rollout

Encode = Callable[[str], Prompt]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A few frames of a session's video."""

    index: int
    """0, 1, 2, ..."""
    start: int
    """First latent frame."""
    first_frame: int
    """First video frame."""
    frames: NDArray[np.uint8]
    """[n,H,W,3], RGB."""
    prompt: str
    prompt_id: int
    """Which prompt made it, as `Session.prompt` numbers them; 0 is the first."""
    window: int
    """Latent frames that it looked back over, itself and the sink included."""
    mode: str
    """How a new prompt took over with this chunk: "bridge-only", "bridge+micro-recache", "full-recache", "keep", "cut";
    empty in all other chunks."""
    rho: float | None
    """Strength of that switch, 0 to 1, or None."""
    timings: dict[str, float]
    """Seconds per stage (telemetry.STAGES)."""
    latents: Float32
    """[c,C,h,w], as the backbone made them."""


class Session:
    """Endless video from prompts. Made by `Pipeline.session`; iterate over it, and close it or use it as a context.

    `prompt` may be called from any thread, also while a chunk is being made; iterate from one thread at a time.
    """

    def __init__(
        self, engine: Engine, encode: Encode, settings: PolicySettings, prompt: str | Prompt, seed: int = 0
    ) -> None:
        geometry = engine.geometry
        shape = (1, geometry.chunk, geometry.latent_channels, geometry.latent_height, geometry.latent_width)
        self._encode = encode
        self._settings = settings
        self._seed = seed
        self._closed = False
        noise = PhiloxNoise(seed, shape)
        noise.draw(0, 0)  # refuses a bad seed now
        self._rollout = Rollout(engine, settings, self._encoded(prompt), noise)

    @property
    def geometry(self) -> Geometry:
        """Shapes of the model."""
        return self._rollout.geometry

    @property
    def settings(self) -> PolicySettings:
        """What decides about the memory."""
        return self._settings

    @property
    def seed(self) -> int:
        """Of the noise."""
        return self._seed

    @property
    def frame(self) -> int:
        """The next chunk's first latent frame."""
        return self._rollout.frame

    @property
    def closed(self) -> bool:
        """Whether the session was closed."""
        return self._closed

    def prompt(self, text: str | Prompt, at_frame: int | None = None) -> int:
        """Change the prompt at the next chunk boundary, or at the first one at or after latent frame `at_frame`.

        A switch that is scheduled ahead lets the window widen before it. When several prompts are due, one takes
        over per chunk, in order of their frames. Returns the prompt's number, which chunks carry as `prompt_id`.

        Raises:
            PromptError: empty, too long, or with words that the model does not know.
            UsageError: `at_frame` lies in the past.
            ClosedError: the session was closed.
        """
        self._check_open()
        if at_frame is not None and at_frame < self.frame:
            raise UsageError(
                f"at_frame is {at_frame} and the next chunk starts at latent frame {self.frame}: "
                "ask for that frame or a later one, or leave at_frame out"
            )
        return self._rollout.ask(self._encoded(text), at_frame)

    def __iter__(self) -> Session:
        return self

    def __next__(self) -> Chunk:
        """Make the next chunk; there is always one.

        Raises:
            ClosedError: the session was closed.
            EngineError: the engine failed. The session is closed then, for its memory is undefined.
        """
        self._check_open()
        rollout = self._rollout
        try:
            step = rollout.advance()
            with rollout.memory.clock.stage("decode"):
                frames = rollout.tensors.decode(step.latents)
        except BaseException:
            self.close()
            raise
        return Chunk(
            index=step.index,
            start=step.start,
            first_frame=self.geometry.video_frames(0, step.start),
            frames=frames[0],
            prompt=step.prompt.text,
            prompt_id=step.number,
            window=step.window,
            mode="" if step.switch is None else step.switch.mode,
            rho=None if step.switch is None else float(step.switch.rho.max()),
            timings=rollout.memory.clock.take(),
            latents=step.latents[0],
        )

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file, from which `Pipeline.restore` goes on byte for byte.

        Raises ClosedError where the session was closed.
        """
        from .snapshot import save

        self._check_open()
        save(path, self._rollout, {"seed": self._seed, "settings": dataclasses.asdict(self._settings)})

    def load_state(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Take the state that snapshot.read gave. Used by `Pipeline.restore`."""
        from .snapshot import put

        put(self._rollout, plain, arrays, self._encoded)

    def close(self) -> None:
        """Free the session's memory; twice is fine."""
        if not self._closed:
            self._closed = True
            self._rollout.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encoded(self, prompt: str | Prompt) -> Prompt:
        return prompt if isinstance(prompt, Prompt) else self._encode(prompt)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this session was closed: open a new one with pipeline.session()")
