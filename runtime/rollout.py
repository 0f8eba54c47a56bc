"""Latents without end: the loop of algorithm.md, section 8, for a batch of B streams in lock-step."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from .engine import Engine, Float32, Prompt
from .errors import UsageError
from .geometry import PolicySettings
from .memory import Forward, Memory, Switch
from .noise import NoiseSource

FRAMES = 1 << 62
"""Frames that a video never has: its prompts wait for earlier ones."""


@dataclass(frozen=True, slots=True, order=True)
class Pending:
    """A prompt that waits for its frame; prompts of the same frame keep their order."""

    frame: int
    number: int
    prompt: Prompt = field(compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One chunk of latents and how it came about."""

    index: int
    start: int
    """Its first latent frame."""
    segment: int
    """The latent frame at which its prompt took over."""
    upcoming: int | None
    """The latent frame of the next switch that was known, as it was asked for."""
    latents: Float32
    """[B,c,C,h,w]."""
    window: int
    """Frames."""
    prompt: Prompt
    number: int
    """Of the prompt: 0 is the first."""
    switch: Switch | None
    """Set in the first chunk of a prompt, except of the very first."""


class Rollout:
    """Denoises chunk after chunk. `ask` may be called from any thread, the rest from one at a time.

    Args:
        engine: gives the networks; the rollout opens an `EngineSession` of its own, `tensors`.
        settings: the policy.
        prompt: the first prompt, of `batch` items.
        noise: where noise comes from.
        batch: B.
        observer: called after every run of the backbone.

    Raises:
        SettingsError: the settings do not fit the model.
        OutOfMemoryError: no memory for the session's arrays.
    """

    def __init__(
        self,
        engine: Engine,
        settings: PolicySettings,
        prompt: Prompt,
        noise: NoiseSource,
        batch: int = 1,
        observer: Callable[[Forward], None] | None = None,
    ) -> None:
        geometry = engine.geometry
        self.geometry = geometry
        self.tensors = engine.open(batch)
        try:
            self.memory = Memory(self.tensors, geometry, settings, observer)
        except BaseException:
            self.tensors.close()
            raise
        self.noise = noise
        self.prompt = prompt
        self.number = 0
        """Of the running prompt."""
        self.asked = 1
        """Prompts so far, the first included."""
        self.index = 0
        """Of the next chunk."""
        self.segment = 0
        shape = (batch, 0, geometry.latent_channels, geometry.latent_height, geometry.latent_width)
        self.emitted: Float32 = np.zeros(shape, np.float32)
        """The last W frames, for recaches: [B,k,C,h,w]."""
        self.pending: list[Pending] = []
        self._lock = Lock()
        self._taken = 0
        """Chunks whose prompts are chosen: `index`, or one more while a chunk is made."""

    @property
    def frame(self) -> int:
        """The next chunk's first latent frame."""
        return self.index * self.geometry.chunk

    @property
    def boundary(self) -> int:
        """The first latent frame at which a prompt that is asked for now can take over: no chunk of it has begun."""
        return max(self.index, self._taken) * self.geometry.chunk

    def ask(self, prompt: Prompt, at_frame: int | None = None) -> int:
        """Queue a prompt for the first chunk boundary at or after `at_frame`, or for the next one; return its number.

        One prompt takes over per boundary: when several are due, the others wait for the next ones, in order. Raises
        UsageError where `at_frame` lies before the next boundary.
        """
        with self._lock:
            boundary = self.boundary
            frame = boundary if at_frame is None else at_frame
            if not boundary <= frame < FRAMES:
                raise UsageError(
                    f"at_frame is {frame} and the next chunk starts at latent frame {boundary}: "
                    "ask for that frame or a later one, or leave at_frame out"
                )
            number = self.asked
            self.asked += 1
            bisect.insort(self.pending, Pending(frame, number, prompt))
            return number

    def waiting(self) -> tuple[int, list[Pending]]:
        """Prompts asked for so far, and those of them that wait, at one moment."""
        with self._lock:
            return self.asked, list(self.pending)

    def advance(self) -> Step:
        """Make the next chunk."""
        memory, steps = self.memory, self.geometry.steps
        start, index = self.frame, self.index
        switch, upcoming = self._take_over(start)
        window = memory.window(start, self.segment, upcoming)
        with memory.clock.stage("denoise"):
            memory.begin(start, self.geometry.chunk, window)
            self.tensors.load(self.noise.draw(index, 0))
            for step in range(steps):
                noise = self.noise.draw(index, step + 1) if step + 1 < steps else None
                memory.forward(step, noise, self.prompt)
            latents = self.tensors.x0()
        with memory.clock.stage("commit"):
            memory.forward(steps, None, self.prompt)
            memory.commit()
        self.emitted = np.concatenate((self.emitted, latents), 1)[:, -self.geometry.window :]
        memory.end_chunk()
        with self._lock:
            self.index += 1
        return Step(index, start, self.segment, upcoming, latents, window, self.prompt, self.number, switch)

    def _take_over(self, start: int) -> tuple[Switch | None, int | None]:
        """Switch to the first prompt that is due; return the switch and the next known one's frame."""
        with self._lock:
            self._taken = self.index + 1
            due = self.pending.pop(0) if self.pending and self.pending[0].frame <= start else None
        switch = None
        if due is not None:
            switch = self.memory.switch(start, self.prompt, due.prompt, self.emitted)
            self.prompt, self.number, self.segment = due.prompt, due.number, start
        with self._lock:
            return switch, self.pending[0].frame if self.pending else None

    def close(self) -> None:
        """Free the session's arrays."""
        self.tensors.close()
