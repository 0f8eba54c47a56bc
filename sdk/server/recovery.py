"""Snapshots of running sessions, and sessions from snapshots."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from swiftvideo.runtime import Session
from swiftvideo.runtime.errors import UsageError

from . import payload
from .engine import discard, save
from .session import Kept, Known, ServedSession, Terms, token_hash
from .status import Refusal
from .store import Store, Stored

if TYPE_CHECKING:
    from .manager import SessionManager

log = logging.getLogger(__name__)


class Recovery:
    """The store with a thread of its own. Belongs to the event loop."""

    def __init__(self, manager: SessionManager) -> None:
        config = manager.config
        assert config.snapshots is not None
        self._manager = manager
        self.store = Store(config.snapshots, config.snapshot_age, round(config.snapshot_space * (1 << 30)))
        self._disk = ThreadPoolExecutor(1, "swiftvideo-disk")
        self._loading: set[str] = set()
        self._expiring: Future[None] = self._disk.submit(lambda: None)
        self.expire()

    def path(self, id: str, index: int) -> str | None:
        """Where the runtime writes a snapshot, from any thread; None where there is no room."""
        return None if self.store.full else self.store.session_path(id, index)

    def write(self, session: ServedSession) -> None:
        """Complete the snapshot that was written right after the chunk that was delivered last."""
        if session.over:  # since then: its chunks that the client has not presented are gone
            self.discard(session, session.delivered)
            return
        terms = session.terms
        stored = Stored(
            id=session.id,
            token_hash=token_hash(session.token),
            client=terms.client,
            index=session.delivered,
            credits=terms.credits,
            encoding=terms.encoding,
            linger=terms.linger,
            chunks=terms.chunks,
            presented=session.presented,
            applied=session.applied,
            prompts=[(id, *known) for id, known in session.prompts.items()],
        )
        done = self._disk.submit(self.store.write, stored, list(session.kept), self._living())
        done.add_done_callback(
            lambda future: self._manager.post(self._written, session, stored.index, future)
        )

    def _written(self, session: ServedSession, index: int, future: Future[None]) -> None:
        error = future.exception()
        if error is None:
            session.stored = True
            session.saved_up_to(index)
            self._manager.metrics.snapshots.inc()
        else:
            self.missed(session, index, f"{type(error).__name__}: {error}")

    def missed(self, session: ServedSession, index: int, text: str = "") -> None:
        """A snapshot was due and is not there: the session goes on without."""
        if not text:
            text = "there is no room" if self.store.full else "the engine could not write it"
        log.error("a snapshot was not written: %s", text, extra={"session": session.id})
        self._manager.metrics.snapshot_failures.inc()
        session.saved_up_to(index)

    async def final(self, session: ServedSession, deadline: float) -> None:
        """Save a session that is stopped as it is after its last chunk, if the event loop's `deadline` allows."""
        job = session.job
        loop = asyncio.get_running_loop()
        while not session.over and not (session.engine.rests(job) and session.delivered == job.next_chunk):
            if loop.time() > deadline:
                return
            await asyncio.sleep(0.01)
        await self._written_out()
        saved = not session.interval or session.delivered <= session.saved
        if session.over or saved or loop.time() > deadline:
            return
        path = self.path(session.id, session.delivered)
        if path is not None and await asyncio.wrap_future(self._disk.submit(save, job.session, path)):
            self.write(session)
            await self._written_out()
        else:
            self.missed(session, session.delivered)

    async def _written_out(self) -> None:
        """Wait for what is being written, and for those who hear of it."""
        await asyncio.wrap_future(self._disk.submit(lambda: None))

    def discard(self, session: ServedSession, index: int) -> None:
        """Delete what the runtime wrote after chunk `index` - 1 of a session that has ended meanwhile."""
        self._disk.submit(discard, self.store.session_path(session.id, index))

    def forget(self, session: ServedSession) -> None:
        """A session has ended for good."""
        if session.interval:
            self._disk.submit(self.store.delete, session.id)

    def expire(self) -> None:
        """Delete what is too old or too much, once the disk's thread comes to it."""
        if self._expiring.done():  # a slow disk is not asked twice
            self._expiring = self._disk.submit(self.store.expire, self._living())
            self._expiring.add_done_callback(_log_failure)

    def _living(self) -> frozenset[str]:
        return frozenset(self._manager.sessions.keys() | self._loading)

    async def restore(self, client: str, token: str) -> ServedSession | None:
        """The session of a resume token, from its snapshot; None where there is none."""
        manager = self._manager
        stored = await asyncio.wrap_future(self._disk.submit(self.store.find, token_hash(token)))
        if stored is None or stored.client != client:
            return None
        encoding = payload.checked(stored.encoding)
        manager.admission.check(client, manager._holders(), stored.credits)
        manager._starting.append(client)
        self._loading.add(stored.id)
        try:
            made, kept = await manager.read(lambda: self._load(stored), lambda loaded: loaded[0].close())
        finally:
            manager._starting.remove(client)
            self._loading.discard(stored.id)
        if stored.id in manager.sessions or manager.draining:
            await manager.read(made.close)
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "another call takes this session up, or the server shuts down",
                1.0,
            )
        terms = Terms(client, stored.credits, encoding, stored.linger, stored.chunks)
        asked = made.asked
        session = manager.adopt(made, stored.id, token, terms, stored.index, asked)
        session.recovered = True
        session.presented = stored.presented
        session.kept.extend(kept)
        session.applied = stored.applied
        for id, number, text, heard in stored.prompts:
            if number < asked:
                session.prompts[id] = Known(number, text, heard)
            if stored.applied <= number < asked:
                session.names[number] = id
        session.stored = True
        log.info("session restored", extra={"session": session.id, "chunks": stored.index})
        return session

    def _load(self, stored: Stored) -> tuple[Session, list[Kept]]:
        """The runtime's session, and the chunks that were not presented."""
        try:
            kept = self.store.chunks(stored)  # first, as it is small and leaves nothing to close
            return self._manager.pipeline.restore(self.store.session_path(stored.id, stored.index)), kept
        except UsageError as error:
            log.warning("a snapshot cannot be used: %s", error, extra={"session": stored.id})
            raise Refusal(
                grpc.StatusCode.DATA_LOSS, "the snapshot of this session cannot be used: start a new one"
            ) from error

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.get_running_loop().run_in_executor(None, self._disk.shutdown)


def _log_failure(future: Future[None]) -> None:
    if future.exception() is not None:
        log.error("old snapshots were not deleted", exc_info=future.exception())
