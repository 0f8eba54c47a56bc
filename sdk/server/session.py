"""One session as the event loop sees it: what was sent, what the client has presented, which prompts wait."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from swiftvideo.runtime import Chunk, Prompt
from swiftvideo.sdk.protocol import MAX_ID, MAX_TEXT
from swiftvideo.v1 import generation_pb2 as pb

from .engine import EngineThread, Job, Made
from .outbox import Outbox
from .payload import pack
from .saving import Saver
from .status import Refusal, invalid, refusal

log = logging.getLogger(__name__)

KNOWN_PROMPTS = 1024
"""Ids of a session that are remembered, so that sending one again is harmless."""
STREAK = 3
"""So many late chunks make a notice."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A chunk that was not presented yet, as sent: the message before it (empty for none), and itself."""

    index: int
    applied: bytes
    chunk: bytes


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session was granted."""

    client: str
    credits: int
    encoding: pb.Encoding
    linger: float
    """Seconds."""
    chunks: int
    """0: endless."""


class Known(NamedTuple):
    """A prompt that was accepted."""

    number: int
    text: str
    heard: int
    """First chunk made with it known."""


class Packed(NamedTuple):
    """A chunk in bytes, or the error in its place."""

    made: Made
    kept: Kept | None
    prompt: str
    """Id of the prompt that took over with it, or empty."""
    seconds: float


def token_hash(token: str) -> str:
    """What is kept of a resume token."""
    return hashlib.sha256(token.encode()).hexdigest()


def check_id(prompt: pb.Prompt) -> None:
    """Raise Refusal where no prompt may have this id."""
    if not 0 < len(prompt.id.encode()) <= MAX_ID:
        raise invalid(f"a prompt's id has {len(prompt.id.encode())} bytes: use 1 to {MAX_ID}")


def too_long(text: str) -> str | None:
    """Why no prompt may have this text, or None."""
    size = len(text.encode())
    return f"the prompt has {size} bytes: use at most {MAX_TEXT}" if size > MAX_TEXT else None


@dataclass(eq=False)
class ServedSession:
    """State of a session. All methods but `ask` and `pack` belong to the event loop."""

    id: str
    token: str
    terms: Terms
    job: Job
    engine: EngineThread
    max_pending: int
    encode: Callable[[str], Prompt]
    """Of the pipeline."""
    began: float = field(default_factory=time.monotonic)
    outbox: Outbox | None = None
    """Of the call that is attached."""
    peer: str = ""
    """Whence it came."""
    presented: int = 0
    """Chunks that the client has presented: their number, and the index of the next."""
    delivered: int = 0
    """Index of the next chunk to come from the engine."""
    paused: bool = False
    stopped: bool = False
    """No further chunk is made: the server shuts down."""
    over: bool = False
    recovered: bool = False
    """From a snapshot: the client may be ahead of it."""
    reason: str = ""
    """How it ended, for the metrics."""
    saver: Saver | None = None
    """Takes its snapshots; None: none are kept."""
    saved: int = 0
    """Chunks that the newest complete snapshot has."""
    stored: bool = False
    """Whether there is a complete snapshot, which outlives the session unless that ends for good."""
    forgotten: bool = False
    """Ended for good: no snapshot may be completed any more."""
    linger_timer: asyncio.TimerHandle | None = None
    kept: deque[Kept] = field(default_factory=deque)
    prompts: OrderedDict[str, Known] = field(default_factory=OrderedDict)
    """By the client's id."""
    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Prompts that are being read, by id: the old call and the new one may bring the same one at once."""
    applied: int = 0
    """Number of the prompt in force at `delivered`."""
    late: int = 0
    asked_at: dict[int, float | None] = field(default_factory=dict)
    """When prompts that wait were asked for, by number; None where they are for a later chunk, and wait for that."""
    names: dict[int, str] = field(default_factory=dict)
    """The client's ids by number, of the prompt in force and of those that wait; after a restore earlier ones, too."""
    naming: threading.Lock = field(default_factory=threading.Lock)
    """Held from asking for a prompt until its name is known and its acceptance is on its way."""

    @property
    def credits_left(self) -> int:
        """Chunks that may be made before the client gives credit."""
        return max(0, self.limit - max(self.delivered, self.presented))

    @property
    def limit(self) -> int:
        """Chunks with a smaller index may be made."""
        limit = self.presented + self.terms.credits
        return min(limit, self.terms.chunks) if self.terms.chunks else limit

    def refresh(self) -> None:
        """Tell the engine what this session may do now."""
        held = self.paused or self.stopped or self.over or self.outbox is None
        self.engine.update(self.job, limit=self.limit, held=held)

    def stop(self) -> None:
        """Let no further chunk be made."""
        self.stopped = True
        self.refresh()

    def send(self, message: pb.GenerateResponse) -> None:
        """To the attached call, if there is one."""
        if self.outbox is not None:
            self.outbox.put(message.SerializeToString())

    def attach(self, outbox: Outbox, next_chunk: int) -> None:
        """Let a call take the session: what it has not received is sent again."""
        self.take_over()
        if self.linger_timer is not None:
            self.linger_timer.cancel()
            self.linger_timer = None
        self.present(next_chunk)
        self.outbox = outbox
        for kept in self.kept:
            if kept.applied:
                outbox.put(kept.applied)
            outbox.put(kept.chunk)
        self.refresh()

    def take_over(self) -> None:
        """End the call that is attached; the session goes on."""
        if self.outbox is not None:
            text = "another call reattached to this session: only the newest one goes on"
            self.outbox.finish(pb.Ended(reason=pb.Ended.REASON_TAKEN_OVER, text=text))
            self.outbox = None
            self.refresh()

    def present(self, count: int) -> None:
        """The client has presented `count` chunks."""
        self.presented = max(self.presented, count)
        while self.kept and self.kept[0].index < self.presented:
            self.kept.popleft()

    def credit(self, index: int) -> None:
        """Chunk `index` was presented. Raises Refusal where it was not sent yet, or comes after a later one."""
        if index >= max(self.delivered, self.presented):
            raise invalid(
                f"credit for chunk {index}, and the last one that was sent is {self.delivered - 1}: "
                "give credit for chunks that you received"
            )
        if index + 1 < self.presented:
            raise invalid(
                f"credit for chunk {index} after credit for {self.presented - 1}: it never goes back"
            )
        self.present(index + 1)
        self.refresh()

    def check_prompt(self, prompt: pb.Prompt) -> str | None:
        """Why a prompt is refused before anyone reads it, or None. Raises Refusal for an impossible id."""
        check_id(prompt)
        reason = too_long(prompt.text)
        if reason is not None:
            return reason
        known = self.prompts.get(prompt.id)
        if known is not None and known.text != prompt.text:
            return (
                f"prompt id {prompt.id!r} stands for another text already: give every prompt an id of its own"
            )
        if known is None and len(self.asked_at) >= self.max_pending:
            return f"{len(self.asked_at)} prompts wait for their chunks: wait until some have been applied"
        return None

    def ask(self, prompt: pb.Prompt, loop: asyncio.AbstractEventLoop) -> None:
        """Read a new prompt and queue it; in a worker thread. Raises PromptError."""
        encoded = self.encode(prompt.text)
        with self.naming:
            loop.call_soon_threadsafe(
                self._accepted, prompt, self._queued(prompt, encoded, prompt.heard_chunk)
            )

    def know(self, prompt: pb.Prompt, encoded: Prompt) -> None:
        """Queue a prompt of the start, which is heard before chunk 0."""
        self._accepted(prompt, self._queued(prompt, encoded, 0))

    def _queued(self, prompt: pb.Prompt, encoded: Prompt, heard: int) -> Known:
        number, heard = self.engine.ask(self.job, encoded, prompt.at_chunk, heard)
        self.names[number] = prompt.id
        return Known(number, prompt.text, heard)

    def _accepted(self, prompt: pb.Prompt, known: Known) -> None:
        self.prompts[prompt.id] = known
        while len(self.prompts) > KNOWN_PROMPTS:
            self.prompts.popitem(last=False)
        self.asked_at[known.number] = None if prompt.at_chunk > known.heard else time.monotonic()
        self.accept(prompt.id)

    def accept(self, id: str) -> None:
        """Tell the client that a prompt is known."""
        self.send(self.acceptance(id))

    def acceptance(self, id: str) -> pb.GenerateResponse:
        """The message that says so."""
        known = self.prompts[id]
        message = pb.PromptAccepted(id=id, number=known.number, heard_chunk=known.heard)
        return pb.GenerateResponse(prompt_accepted=message)

    def pack(self, made: Made) -> Packed:
        """A chunk as messages, or the error in its place, whatever it is; in the packing thread."""
        if made.chunk is None:
            return Packed(made, None, "", 0.0)
        try:
            return self._pack(made, made.chunk)
        except Exception as error:  # nobody else hears of it
            log.exception("a chunk was not packed")
            return Packed(replace(made, error=error), None, "", 0.0)

    def _pack(self, made: Made, chunk: Chunk) -> Packed:
        begin = time.monotonic()
        payloads = pack(chunk.frames, self.terms.encoding, self.job.session.geometry.fps)
        seconds = time.monotonic() - begin
        with self.naming:
            name = self.names.get(chunk.prompt_id, "")
        applied = b""
        if chunk.mode:
            switch = pb.PromptApplied(id=name, chunk_index=chunk.index, mode=chunk.mode, rho=chunk.rho)
            applied = pb.GenerateResponse(prompt_applied=switch).SerializeToString()
        timings = pb.Timings(
            queue_ms=made.queued * 1000,
            engine_ms=made.took * 1000,
            encode_ms=seconds * 1000,
            stages_ms={stage: value * 1000 for stage, value in chunk.timings.items()},
        )
        message = {  # which makes a pb.Chunk in its place: one made before would be copied, and raw frames are large
            "index": chunk.index,
            "first_frame": chunk.first_frame,
            "frame_count": len(chunk.frames),
            "payloads": payloads,
            "prompt_id": name,
            "window": chunk.window,
            "mode": chunk.mode,
            "timings": timings,
        }
        data = pb.GenerateResponse(chunk=message).SerializeToString()
        return Packed(made, Kept(chunk.index, applied, data), name if chunk.mode else "", seconds)

    def deliver(self, packed: Packed) -> float | None:
        """Send a chunk and keep it until it was presented; seconds that its prompt waited where one took over that was
        for the next chunk."""
        kept, chunk = packed.kept, packed.made.chunk
        assert kept is not None and chunk is not None
        waited = None
        if chunk.mode:
            self.names.pop(self.applied, None)  # others with smaller numbers may wait for later chunks
            self.applied = chunk.prompt_id
            asked = self.asked_at.pop(chunk.prompt_id, None)
            waited = None if asked is None else time.monotonic() - asked
        self.delivered = kept.index + 1
        if kept.index < self.presented:  # made again after a restart; the client has it
            return waited
        self.kept.append(kept)
        if self.outbox is not None:
            if kept.applied:
                self.outbox.put(kept.applied)
            self.outbox.put(kept.chunk)
            self._throttled(packed)
        return waited

    def _throttled(self, packed: Packed) -> None:
        """Say so once when chunks come slower than they play, and again after they were in time."""
        late = packed.made.queued + packed.made.took + packed.seconds - self.job.period
        self.late = self.late + 1 if late > 0 else 0
        if self.late == STREAK:
            text = f"{STREAK} chunks in a row came slower than they play: the server is busy"
            notice = pb.Notice(
                kind=pb.Notice.KIND_THROTTLED, text=text, milliseconds=max(1, round(late * 1000))
            )
            self.send(pb.GenerateResponse(notice=notice))

    @property
    def complete(self) -> bool:
        """Whether all chunks that were asked for have been presented."""
        return 0 < self.terms.chunks <= self.presented

    def finish(self, outcome: pb.Ended | Refusal) -> None:
        """End the session: the call closes, the engine gives it up."""
        if self.over:
            return
        self.over = True
        if isinstance(outcome, Refusal):
            self.reason = outcome.reason
        else:
            self.reason = pb.Ended.Reason.Name(outcome.reason).removeprefix("REASON_").lower()
        if self.linger_timer is not None:
            self.linger_timer.cancel()
        if self.outbox is not None:
            self.outbox.finish(outcome)
        self.kept.clear()
        self.engine.cancel(self.job)

    def fail(self, error: BaseException) -> None:
        """End the session with the status of an error."""
        self.finish(refusal(error))
