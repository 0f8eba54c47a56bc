"""Where a chunk's time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("inject", "recache", "denoise", "commit", "decode")
"""Stages of a chunk. inject, recache: only where a prompt took over; commit: the context pass and its rows' copy."""


class Stopwatch:
    """Seconds per stage, summed until `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Seconds per stage since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
