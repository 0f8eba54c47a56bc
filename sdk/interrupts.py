"""SIGINT, SIGTERM and SIGHUP end a command the same way: as KeyboardInterrupt, so that all is closed and cleaned up."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP (a closed terminal) into KeyboardInterrupt, with the signal's number, but never
    in the middle of a write.

    Outside the main thread signals cannot be caught; there it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._shielded = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._old = {
                number: signal.signal(number, self._handle)
                for number in self.SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN  # as background jobs and nohup have it
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if not self._shielded:
            raise KeyboardInterrupt(number)

    @contextmanager
    def shield(self, last: bool = False) -> Iterator[None]:
        """Hold signals back inside; one that came meanwhile is raised at the end, unless this is the `last` work."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self.received and not last:
            raise KeyboardInterrupt(self.received)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end what is inside, which removes what it had begun, and then the command."""
    with Interrupts() as interrupts:
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted: what was not finished is removed", file=sys.stderr)
            raise SystemExit(128 + (interrupts.received or signal.SIGINT)) from None
