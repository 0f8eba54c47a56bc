"""When the engine's thread takes snapshots of a session, and how many may be in memory at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from swiftvideo.runtime import Session, Snapshot
from swiftvideo.runtime.errors import SwiftVideoError

NO_ROOM = "there is no room on the disk"


class Copies:
    """Snapshots in memory, of all sessions: each is as large as a session. Any thread may use it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._coming = 0
        self._there: set[weakref.ref[Snapshot]] = set()

    def __len__(self) -> int:
        return self._coming + len(self._there)

    def reserve(self) -> bool:
        """Whether there may be one more; it is `taken` next."""
        with self._lock:
            room = len(self) < self._most
            self._coming += room
            return room

    def taken(self, work: Callable[[], Snapshot]) -> Snapshot:
        """The one that a place was reserved for; the place is free once nobody holds it any more."""
        try:
            made = work()
            self._there.add(weakref.ref(made, self._there.discard))
            return made
        finally:
            with self._lock:
                self._coming -= 1


class Saver:
    """Snapshots of one session: one after every `every` chunks, and while the server drains after each.

    At most one of them is on its way. One that is due and finds no room waits for the next chunk, and is missed once
    the one after it is due.

    Args:
        made: chunks of the session so far.
        full: whether the disk has no room.
        missed: is told, in the engine's thread, why there will be none.
    """

    def __init__(
        self,
        session: Session,
        every: int,
        made: int,
        copies: Copies,
        full: Callable[[], bool],
        draining: Callable[[], bool],
        missed: Callable[[str], object],
    ) -> None:
        self._session, self._every, self._copies = session, every, copies
        self._full, self._draining, self._missed = full, draining, missed
        self._due = self._after(made)
        """Chunks after which the next one is due."""
        self.writing = False
        """Whether one was taken, and is neither complete nor given up."""

    def __call__(self, made: int) -> Snapshot | None:
        """After chunk `made` - 1, in the engine's thread: a snapshot, if it is time for one."""
        due = made >= self._due
        if not due and not self._draining():
            return None
        if self._full():
            if due:
                self._due = self._after(made)
                self._missed(NO_ROOM)
            return None
        if self.writing or not self._copies.reserve():
            if made >= self._due + self._every:
                self._due += self._every
                self._missed("those before it are still being written, or no memory is free for it")
            return None
        self._due = self._after(made)
        return self.take()

    def take(self) -> Snapshot | None:
        """A snapshot in the place that was reserved; None where it is missed. Between two chunks, in any thread."""
        try:
            made = self._copies.taken(self._session.snapshot)
        except (SwiftVideoError, MemoryError) as error:
            self._missed(f"{type(error).__name__}: {error}")
            return None
        self.writing = True
        return made

    def _after(self, made: int) -> int:
        return (made // self._every + 1) * self._every
