"""Snapshots of running sessions, and sessions from snapshots."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from swiftvideo.runtime import Session
from swiftvideo.runtime.errors import UsageError
from swiftvideo.runtime.snapshot import read

from . import payload
from .session import Kept, Known, ServedSession, Terms, token_hash
from .status import Refusal
from .store import LOAD_ERRORS, Store, Stored

if TYPE_CHECKING:
    from .manager import SessionManager

log = logging.getLogger(__name__)


class Recovery:
    """The store with a thread of its own. Belongs to the event loop."""

    def __init__(self, manager: SessionManager) -> None:
        assert manager.config.snapshots is not None
        self._manager = manager
        self.store = Store(manager.config.snapshots, manager.config.snapshot_age)
        self._disk = ThreadPoolExecutor(1, "swiftvideo-disk")
        self._held: set[str] = set()
        self._disk.submit(self.store.expire)

    def holds(self, session: ServedSession) -> bool:
        """Whether there is a snapshot."""
        return session.id in self._held

    def write(self, session: ServedSession) -> None:
        """Complete the snapshot that the engine wrote right after the chunk that was delivered last."""
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
        self._held.add(session.id)
        done = self._disk.submit(self.store.write, stored, list(session.kept))
        done.add_done_callback(
            lambda future: self._manager.post(self._written, session, stored.index, future)
        )

    def _written(self, session: ServedSession, index: int, future: Future[None]) -> None:
        error = future.exception()
        if error is None:
            self._manager.metrics.snapshots.inc()
        else:
            log.error("a snapshot was not written: %s", error, extra={"session": session.id})
        session.saved_up_to(index)

    def forget(self, session: ServedSession) -> None:
        """A session has ended for good."""
        if session.id in self._held:
            self._held.discard(session.id)
            self._disk.submit(self.store.delete, session.id)

    async def expire(self) -> None:
        """Delete what is too old."""
        await asyncio.wrap_future(self._disk.submit(self.store.expire))

    async def restore(self, client: str, token: str) -> ServedSession | None:
        """The session of a resume token, from its snapshot; None where there is none."""
        manager = self._manager
        stored = await asyncio.wrap_future(self._disk.submit(self.store.find, token_hash(token)))
        if stored is None or stored.client != client:
            return None
        manager.admission.check(client, manager._holders(), stored.credits)
        manager._starting.append(client)
        try:
            made, asked, kept = await manager.read(
                lambda: self._load(stored), lambda loaded: loaded[0].close()
            )
        finally:
            manager._starting.remove(client)
        if stored.id in manager.sessions or manager.draining:
            made.close()
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "another call takes this session up, or the server shuts down",
                1.0,
            )
        encoding = payload.checked(stored.encoding)
        terms = Terms(client, stored.credits, encoding, stored.linger, stored.chunks)
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
        self._held.add(session.id)
        log.info("session restored", extra={"session": session.id, "chunks": stored.index})
        return session

    def _load(self, stored: Stored) -> tuple[Session, int, list[Kept]]:
        """The runtime's session, how many prompts it knows, and the chunks that were not presented."""
        path = self.store.session_path(stored.id, stored.index)
        try:
            return self._manager.pipeline.restore(path), read(path).asked, self.store.chunks(stored)
        except (UsageError, *LOAD_ERRORS) as error:
            log.warning("a snapshot cannot be used: %s", error, extra={"session": stored.id})
            raise Refusal(
                grpc.StatusCode.DATA_LOSS,
                f"the snapshot of this session cannot be used ({error}): start a new one",
            ) from error

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.get_running_loop().run_in_executor(None, self._disk.shutdown)
