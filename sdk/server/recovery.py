"""Snapshots of running sessions, and sessions from snapshots."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from swiftvideo.runtime import Session, Snapshot
from swiftvideo.runtime.errors import SwiftVideoError, UsageError

from . import payload
from .saving import NO_ROOM, Copies, Saver
from .session import Kept, Known, ServedSession, Terms, token_hash
from .status import Refusal
from .store import Store, Stored

if TYPE_CHECKING:
    from .manager import SessionManager

log = logging.getLogger(__name__)


class Recovery:
    """The store, with threads for what is large and one for the rest. Belongs to the event loop.

    A snapshot is a copy that the engine's thread takes (saving.py); a thread of `_writers` hashes and writes it, which
    takes seconds for gigabytes, and the one of `_disk` completes it. Another one loads.
    """

    def __init__(self, manager: SessionManager) -> None:
        config = manager.config
        assert config.snapshots is not None
        self._manager = manager
        self.store = Store(config.snapshots, config.snapshot_age, round(config.snapshot_space * (1 << 30)))
        self.copies = Copies(config.snapshot_writes)
        self._writers = ThreadPoolExecutor(config.snapshot_writes, "swiftvideo-snapshots")
        self._disk = ThreadPoolExecutor(1, "swiftvideo-disk")
        self._loader = ThreadPoolExecutor(1, "swiftvideo-restore")
        self._writing: dict[ServedSession, asyncio.Task[None]] = {}
        self._loading: set[str] = set()
        self._expiring: Future[None] = self._disk.submit(lambda: None)
        self.expire()
        room = int(config.snapshot_space * (1 << 30) / manager.admission.cache_bytes)
        if room < 2 * config.max_sessions:
            log.warning(
                "snapshot_space has room for %d snapshots of this model, and %d sessions need twice as many while new "
                "ones replace old ones: where it is full, sessions go on without",
                room,
                config.max_sessions,
            )

    def saver(self, made: Session, id: str, count: int) -> Saver:
        """For a session that has made `count` chunks."""
        manager = self._manager
        return Saver(
            made,
            manager.config.snapshot_chunks,
            count,
            self.copies,
            full=lambda: self.store.full,
            draining=lambda: manager.draining,
            missed=lambda text: self.missed(id, text),
        )

    def write(self, session: ServedSession, snapshot: Snapshot) -> None:
        """Write a snapshot that was taken right after the chunk that was delivered last."""
        assert snapshot.index == session.delivered
        if session.over:  # since then: its chunks that the client has not presented are gone
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
        file = self._writers.submit(_write, snapshot, self.store.session_path(stored.id, stored.index))
        task = asyncio.create_task(self._complete(session, stored, list(session.kept), file))
        self._writing[session] = task
        task.add_done_callback(lambda _: self._written(session))

    async def _complete(
        self, session: ServedSession, stored: Stored, kept: list[Kept], file: Future[str]
    ) -> None:
        """Make what a thread writes a whole snapshot, unless its session ends for good meanwhile."""
        begin = time.monotonic()
        try:
            wrong = await asyncio.wrap_future(file)
            if not wrong and not session.forgotten:
                work = self._disk.submit(self.store.write, stored, kept, self._living())
                await asyncio.wrap_future(work)
        except Exception as error:  # noqa: BLE001 - whatever it is costs the snapshot, and is in the log
            wrong = f"{type(error).__name__}: {error}"
        if session.forgotten:
            self._disk.submit(self.store.delete, session.id)
        elif wrong:
            self.missed(session.id, wrong)
        else:
            session.stored, session.saved = True, stored.index
            self._manager.metrics.snapshots.inc()
            self._manager.metrics.snapshot.observe(time.monotonic() - begin)

    def _written(self, session: ServedSession) -> None:
        del self._writing[session]
        if session.saver is not None:
            session.saver.writing = False

    def writes(self, session: ServedSession) -> bool:
        """Whether a snapshot is being written that the session may be taken up from."""
        return session in self._writing and not session.forgotten

    def missed(self, id: str, text: str) -> None:
        """A snapshot was due and will not be there: the session goes on without. From any thread."""
        log.error("a snapshot was not written: %s", text, extra={"session": id})
        self._manager.metrics.snapshot_failures.inc()

    async def final(self, session: ServedSession, deadline: float) -> None:
        """Save a session that is stopped as it is after its last chunk, if the event loop's `deadline` allows."""
        job, saver = session.job, session.saver
        loop = asyncio.get_running_loop()

        async def came(event: Callable[[], bool]) -> bool:
            while not event():
                if session.over or loop.time() > deadline:
                    return False
                await asyncio.sleep(0.01)
            return True

        def rests() -> bool:
            return session.engine.rests(job) and session.delivered == job.next_chunk

        if saver is None or not await came(rests) or not await came(lambda: session not in self._writing):
            return
        if session.over or session.delivered <= session.saved or loop.time() > deadline:
            return
        if self.store.full:
            self.missed(session.id, NO_ROOM)
        elif await came(self.copies.reserve):
            snapshot = await asyncio.wrap_future(self._writers.submit(saver.take))
            if snapshot is not None:
                self.write(session, snapshot)
                del snapshot  # which the thread frees once it is written
                await self._settled([session])

    async def _settled(self, sessions: Collection[ServedSession]) -> None:
        """Wait until no snapshot of these is being written."""
        tasks = [task for session, task in self._writing.items() if session in sessions]
        if tasks:
            await asyncio.wait(tasks)

    def forget(self, session: ServedSession) -> None:
        """A session has ended for good."""
        session.forgotten = True
        if session.saver is not None:
            self._disk.submit(self.store.delete, session.id)

    def expire(self) -> None:
        """Delete what is too old or too much, once the disk's thread comes to it."""
        if self._expiring.done():  # a slow disk is not asked twice
            self._expiring = self._disk.submit(self.store.expire, self._living())
            self._expiring.add_done_callback(_log_failure)

    def _living(self) -> frozenset[str]:
        written = {session.id for session in self._writing}
        return frozenset(self._manager.sessions.keys() | self._loading | written)

    async def restore(self, client: str, token: str) -> ServedSession | None:
        """The session of a resume token, from its snapshot; None where there is none."""
        manager = self._manager
        wanted = token_hash(token)
        await self._settled([session for session in self._writing if token_hash(session.token) == wanted])
        stored = await asyncio.wrap_future(self._disk.submit(self.store.find, wanted))
        if stored is None or stored.client != client:
            return None
        encoding = payload.checked(stored.encoding)
        manager.admission.check(client, manager._holders(), stored.credits)
        manager._starting.append(client)
        self._loading.add(stored.id)
        try:
            made, kept = await manager.read(
                lambda: self._load(stored), lambda loaded: loaded[0].close(), self._loader
            )
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
        await self._settled(list(self._writing))
        for pool in (self._writers, self._loader, self._disk):
            await asyncio.get_running_loop().run_in_executor(None, pool.shutdown)


def _write(snapshot: Snapshot, path: str) -> str:
    """Why a snapshot could not be written, or nothing. As text: an exception's frames would hold the snapshot."""
    try:
        snapshot.save(path)
    except (SwiftVideoError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _log_failure(future: Future[None]) -> None:
    if future.exception() is not None:
        log.error("old snapshots were not deleted", exc_info=future.exception())
