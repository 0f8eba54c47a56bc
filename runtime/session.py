"""One endless video: prompts in, chunks of frames out."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .engine import Engine, Float32, Prompt
from .errors import ClosedError, StoppedError, SwiftVideoError, UsageError
from .geometry import Geometry, Mode, PolicySettings
from .noise import PhiloxNoise, checked_seed
from .rollout import Rollout
from .snapshot import Snapshot, put, take

Encode = Callable[[str], Prompt]
T = TypeVar("T")


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
    mode: Mode | Literal[""]
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

    Every method may be called from any thread, but only `close` from a signal handler. `prompt` never waits for the
    chunk that is being made; `snapshot`, `save` and `close` do. Within `interrupt`, `close` takes effect at the chunk's
    end.

    Args:
        encode: makes prompts of texts.
        model: names the weights; a saved session goes on only with the same.
    """

    def __init__(
        self,
        engine: Engine,
        encode: Encode,
        settings: PolicySettings,
        prompt: str | Prompt,
        seed: int,
        model: str,
    ) -> None:
        geometry = engine.geometry
        shape = (1, geometry.chunk, geometry.latent_channels, geometry.latent_height, geometry.latent_width)
        self._encode = encode
        self._settings = settings
        self._seed = checked_seed(seed)
        self._model = model
        self._closed = False
        self.interrupt: Callable[[], bool] | None = None
        """Asked after every run of the backbone; once it says yes, the chunk is given up with StoppedError. A closed
        session has none."""
        self._running = RLock()
        """Held while a chunk is made, or the state is saved."""
        self._busy = False
        """Whether that is so: the lock alone does not keep out the thread that holds it."""
        itself = weakref.proxy(self)  # else both would live until a cyclic collection, with all their prompts
        self._rollout = Rollout(
            engine,
            settings,
            self._encoded(prompt),
            PhiloxNoise(self._seed, shape),
            observer=lambda _: itself._watch(),
        )

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
    def asked(self) -> int:
        """Prompts so far, the first included: the number that the next one gets."""
        return self._rollout.asked

    @property
    def closed(self) -> bool:
        """Whether the session was closed."""
        return self._closed

    def prompt(self, text: str | Prompt, at_frame: int | None = None) -> int:
        """Change the prompt at the next chunk boundary, or at the first one at or after latent frame `at_frame`.

        A switch that is scheduled ahead lets the window widen before it. When several prompts are due, one takes
        over per chunk, in order of their frames. While a chunk is made, the next boundary is its end. Returns the
        prompt's number, which chunks carry as `prompt_id`.

        Raises:
            PromptError: empty, too long, or with words that the model does not know.
            UsageError: `at_frame` lies before the next boundary, or is no whole number.
            EngineError: it could not be encoded, or its signature is not finite.
            ClosedError: the session was closed.
        """
        self._check_open()
        if at_frame is not None:
            try:
                at_frame = operator.index(at_frame)
            except TypeError as error:
                raise UsageError(
                    f"at_frame is {at_frame!r}: a whole number of latent frames is needed"
                ) from error
        return self._rollout.ask(self._encoded(text), at_frame)

    def __iter__(self) -> Session:
        return self

    def __next__(self) -> Chunk:
        """Make the next chunk; there is always one.

        Raises:
            ClosedError: the session was closed.
            EngineError: the engine failed.
            StoppedError: `interrupt` said so.

        Whatever is raised while a chunk is made, KeyboardInterrupt too, closes the session, for its memory is undefined
        then. To go on after that, `save` the session before and `Pipeline.restore` it.
        """
        return self._alone(self._next, fatal=True)

    def _next(self) -> Chunk:
        rollout = self._rollout
        step = rollout.advance()
        with rollout.memory.clock.stage("decode"):
            frames = rollout.tensors.decode(step.latents)
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

    def snapshot(self) -> Snapshot:
        """A copy of everything, to be saved while the session goes on.

            state = session.snapshot()  # between two chunks
            threading.Thread(target=state.save, args=(path,)).start()

        It is as large as the session, and lies in the host's memory. Writing takes far longer than the copy: 1 s per GB
        for its SHA-256 alone.

        Raises:
            UsageError: a prompt was made from embeddings.
            OutOfMemoryError: no memory for the copy.
            ClosedError: the session was closed.
        """
        return self._alone(lambda: take(self._rollout, self._seed, self._settings, self._model))

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file, from which `Pipeline.restore` goes on byte for byte.

        path: of a file, or of a link to one; a file that is there is replaced in one step. Only its owner may read the
        new one, whatever the umask. Its SHA-256 goes with it. The same engine, kind of processor and number of threads
        make the same bytes; with others, a frame's values may differ by one. The next chunk may be made meanwhile, by
        another thread: what is written is a `snapshot`.

        Raises:
            UsageError: the file cannot be written, `path` is a folder, a pipe or a device, or a prompt was made from
                embeddings.
            OutOfMemoryError, ClosedError: as `snapshot`.
        """
        self.snapshot().save(path)

    def load_state(self, saved: Snapshot) -> None:
        """Take a saved state of the same model and settings. Used by `Pipeline.restore`; raises UsageError."""
        self._alone(lambda: put(self._rollout, saved, self._encoded))

    def close(self) -> None:
        """Free the session's memory, after the chunk that is being made; twice is fine."""
        self._closed = True  # at once, so that no further chunk begins
        with self._running:
            if not self._busy:  # else this very thread is in a chunk, which ends first
                self._free()

    def _alone(self, work: Callable[[], T], fatal: bool = False) -> T:
        """Do what nothing else may touch the session's arrays during. fatal: the session is closed if it fails."""
        with self._running:
            self._check_open()
            if self._busy:
                raise UsageError(
                    "the session is making a chunk: call next() and save() after it, not from within"
                )
            self._busy = True
            try:
                made = work()
                if self._closed:  # meanwhile; by this thread, it may be
                    self._free()
                return made
            except BaseException as error:
                self._closed = self._closed or fatal
                if self._closed:
                    try:
                        self._free()
                    except SwiftVideoError as second:  # of the two, the first one tells what went wrong
                        error.add_note(f"then the session did not close: {second}")
                raise
            finally:
                self._busy = False

    def _free(self) -> None:
        self.interrupt = None  # whose owner may hold the session
        self._rollout.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        if self.interrupt is not None and self.interrupt():
            raise StoppedError("the chunk was given up, as the session's interrupt asked")

    def _encoded(self, prompt: str | Prompt) -> Prompt:
        return prompt if isinstance(prompt, Prompt) else self._encode(prompt)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this session was closed: open a new one with pipeline.session()")
