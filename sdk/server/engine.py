"""The engine's thread: makes chunks of all sessions, one at a time, the most urgent first."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from swiftvideo.runtime import Chunk, Prompt, Session, Snapshot
from swiftvideo.runtime.errors import EngineError, StoppedError

log = logging.getLogger(__name__)

GIVEN_UP = "the session was given up"


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A chunk, or what kept it from being made, or from being packed. Seconds."""

    chunk: Chunk | None
    error: BaseException | None
    queued: float
    """From the moment the chunk could be made."""
    took: float
    snapshot: Snapshot | None = None
    """Of the session right after the chunk, where one was due and could be taken."""


class Ask(NamedTuple):
    """A prompt that the engine's thread has not told the session yet."""

    heard: int
    """Chunk before which it does."""
    prompt: Prompt
    at_chunk: int


class Job:
    """A session as the engine's thread sees it. Change it only through `EngineThread`.

    Args:
        session: of the runtime.
        done: called in the engine's thread with every `Made`; after one with an error no other comes.
        period: seconds that a chunk plays.
        next_chunk: index of the chunk that is made first.
        asked: prompts that the session has been told, the first included.
        snapshot: called after every chunk with their number, in the engine's thread: takes a snapshot where one is due.
            None: there are none.
    """

    def __init__(
        self,
        session: Session,
        done: Callable[[Made], None],
        period: float,
        next_chunk: int = 0,
        asked: int = 1,
        snapshot: Callable[[int], Snapshot | None] | None = None,
    ) -> None:
        self.session = session
        self.done = done
        self.period = period
        self.next_chunk = next_chunk
        self.asked = asked
        self.asks: deque[Ask] = deque()
        self.snapshot = snapshot
        self.limit = next_chunk
        """Chunks with a smaller index may be made."""
        self.held = True
        self.cancelled = False
        self.deadline = 0.0
        """When the next chunk should be there, monotonic."""
        self.ready_since = 0.0
        self.forwards = 0
        """Runs of the backbone so far."""
        self.forwards_cancelled = 0
        """Those that ended after the cancel."""
        session.interrupt = self._interrupt

    @property
    def ready(self) -> bool:
        """Whether a chunk may be made."""
        return not self.held and not self.cancelled and self.next_chunk < self.limit

    def _interrupt(self) -> bool:
        self.forwards += 1
        if self.cancelled:
            self.forwards_cancelled += 1
        return self.cancelled


class EngineThread:
    """One worker over all jobs. Deadlines: a chunk is due when the one before has played, or at once where the session
    is behind, so sessions that are late take turns and none starves."""

    def __init__(self, on_crash: Callable[[BaseException], None] | None = None) -> None:
        self._condition = threading.Condition()
        self._jobs: set[Job] = set()
        self._running: Job | None = None
        self._running_since = 0.0
        self._stopping = False
        """Whether no job is taken any more."""
        self._on_crash = on_crash
        self._thread = threading.Thread(target=self._work, name="swiftvideo-engine", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Take a job on; it is held until `update` says otherwise. Where the thread has ended, so does the job."""
        with self._condition:
            stopping = self._stopping
            if not stopping:
                self._jobs.add(job)
        if stopping:
            _end(job, Made(None, EngineError("the engine's thread has ended: try again"), 0.0, 0.0))

    def update(self, job: Job, limit: int | None = None, held: bool | None = None) -> None:
        """Change what a job may do."""
        with self._condition:
            was = job.ready
            job.limit = job.limit if limit is None else limit
            job.held = job.held if held is None else held
            if job.ready and not was:
                job.ready_since = time.monotonic()
                job.deadline = max(job.deadline, job.ready_since)
                self._condition.notify()

    def ask(self, job: Job, prompt: Prompt, at_chunk: int, heard: int = 0) -> tuple[int, int]:
        """Queue a prompt; its number, and the first chunk that is made with it known.

        The session is told between two chunks, by the engine's thread, so that this chunk is exact and a session that
        is made again from a snapshot hears it at the same moment. heard: not before that chunk.
        """
        with self._condition:
            number, job.asked = job.asked, job.asked + 1
            heard = max(heard, job.next_chunk + (job is self._running), job.asks[-1].heard if job.asks else 0)
            job.asks.append(Ask(heard, prompt, at_chunk))
            return number, heard

    def cancel(self, job: Job) -> None:
        """Give a job up, without waiting: a chunk in the making stops at the next run of the backbone.

        The engine's thread frees the session's memory, and calls `job.done` with StoppedError once nothing of it is
        left. On a GPU that may wait for the device, which no caller has time for.
        """
        with self._condition:
            job.cancelled = True
            self._condition.notify()

    @property
    def busy_for(self) -> float:
        """Seconds since the chunk in the making, or the end of a job, began; 0 where there is none."""
        with self._condition:
            return time.monotonic() - self._running_since if self._running is not None else 0.0

    def rests(self, job: Job) -> bool:
        """Whether no chunk of a job is in the making."""
        with self._condition:
            return job is not self._running

    @property
    def waiting(self) -> int:
        """Jobs that could be worked on."""
        with self._condition:
            return sum(job.ready and job is not self._running for job in self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self, timeout: float) -> bool:
        """Cancel every job and end the thread; whether it ended in time."""
        with self._condition:
            self._stopping = True
            for job in self._jobs:
                job.cancelled = True
            self._condition.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            while True:
                with self._condition:
                    while (job := self._most_urgent()) is None and not self._stopping:
                        self._condition.wait()
                    if job is None:
                        return
                    self._running, self._running_since = job, time.monotonic()
                self._serve(job)
        except BaseException as error:  # a bug here must not leave sessions waiting for ever
            log.exception("the engine's thread ended")
            with self._condition:
                jobs, self._jobs, self._running, self._stopping = list(self._jobs), set(), None, True
            text = f"the engine's thread ended with {type(error).__name__}"
            for job in jobs:
                _end(job, Made(None, EngineError(text), 0.0, 0.0))
            if self._on_crash is not None:
                self._on_crash(error)

    def _most_urgent(self) -> Job | None:
        """What is given up comes first: it takes little time, and frees memory."""
        jobs = (job for job in self._jobs if job.ready or job.cancelled)
        return min(jobs, key=lambda job: (not job.cancelled, job.deadline), default=None)

    def _serve(self, job: Job) -> None:
        """Make one chunk of a job and hand it on, or end the job."""
        asks = []
        with self._condition:
            while job.asks and job.asks[0].heard <= job.next_chunk:
                asks.append(job.asks.popleft())
        begin = self._running_since
        queued = begin - job.ready_since
        try:
            _check(job)
            for ask in asks:
                ahead = ask.at_chunk > job.next_chunk
                job.session.prompt(ask.prompt, ask.at_chunk * job.session.geometry.chunk if ahead else None)
            chunk = next(job.session)
            _check(job)
            snapshot = None if job.snapshot is None else job.snapshot(chunk.index + 1)
            made = Made(chunk, None, queued, time.monotonic() - begin, snapshot)
        except Exception as error:  # whatever one session does wrong ends that session only
            if not isinstance(error, StoppedError):
                log.exception("a chunk failed")
            error = error.with_traceback(None)  # which holds this frame, and so the job and what is made here
            made = Made(None, error, queued, time.monotonic() - begin)
        now = time.monotonic()
        with self._condition:
            if made.error is None and job.cancelled:
                made = Made(None, StoppedError(GIVEN_UP), queued, now - begin)
            if made.error is None:
                job.next_chunk += 1
                job.deadline = max(job.deadline, now) + job.period
                job.ready_since = now
                self._running = None
            else:
                self._jobs.discard(job)
        if made.error is None:
            job.done(made)
            return
        _end(job, made)
        with self._condition:
            self._running = None


def _check(job: Job) -> None:
    """Raise StoppedError where a job was given up."""
    if job.cancelled:
        raise StoppedError(GIVEN_UP)


def _end(job: Job, made: Made) -> None:
    """Free a job's memory and hand on why."""
    try:
        job.session.close()
    except Exception:  # the other sessions' memory is not hurt by it
        log.exception("a session did not close")
    job.done(made)
