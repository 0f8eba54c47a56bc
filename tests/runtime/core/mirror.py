"""A C core beside the oracle: every call goes to both, and the copies that commit asks for are followed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from swiftvideo.runtime._core import Cache
from swiftvideo.runtime.errors import UsageError
from tests.runtime.core.oracle import Key, Oracle, Refused


class Mirror:
    """Both caches, and `content[row]`: the token that the copies so far have put there."""

    def __init__(self, frame_tokens: int, window: int, sink: int, max_anchors: int) -> None:
        self.oracle = Oracle(frame_tokens, window, sink, max_anchors)
        self.cache = Cache(frame_tokens, window, sink, max_anchors)
        self.content: list[Key | None] = [None] * self.cache.rows
        self.content[:2] = [("bridge", 0), ("bridge", 1)]
        self.content[2 : 2 + max_anchors] = [("anchor", i) for i in range(max_anchors)]
        self.segments = np.full((6, 2), -7, np.int32)
        self.ranges = np.full((4, 3), -7, np.int32)
        self.spans = np.full((5, 3, 2), -7, np.int32)

    def forward(
        self, start: int, frames: int, window: int, force_sink: bool, commit: bool = True
    ) -> list[Key] | None:
        """Plan (and commit) on both sides. Returns the keys, or None where both refuse."""
        before = self.cache.state()
        try:
            expected = self.oracle.plan(start, frames, window, force_sink)
        except Refused:
            for call in (
                lambda: self.cache.plan(start, frames, window, force_sink, self.segments),
                lambda: (
                    self.cache.commit(start, frames, force_sink, self.ranges)
                    if window >= 1
                    else self._refuse()
                ),
            ):
                try:
                    call()
                except UsageError:
                    continue
                raise AssertionError(
                    f"the core accepted start {start}, frames {frames}, window {window}"
                ) from None
            assert self.cache.state() == before
            return None
        self._expect(expected, start, frames, window, force_sink)
        assert self.cache.state() == before, "plan changed the cache"
        if commit:
            self._commit(start, frames, force_sink)
            self._expect(
                self.oracle.plan(start, frames, window, force_sink), start, frames, window, force_sink
            )
        return expected

    @staticmethod
    def _refuse() -> None:
        raise UsageError("commit has no window")

    def _expect(self, expected: list[Key], start: int, frames: int, window: int, force_sink: bool) -> None:
        keys = self.cache.plan(start, frames, window, force_sink, self.segments)
        fresh = [start * self.oracle.P + i for i in range(frames * self.oracle.P)]
        rows: list[Key | None] = [*self.content, *fresh]
        found: list[Key | None] = []
        for first, length in self.segments.tolist():
            assert length >= 0 and first >= 0 and first + length <= len(rows)
            assert not first < self.cache.rows < first + length, "a segment crosses from cache to fresh rows"
            found += rows[first : first + length]
        used = [length > 0 for _, length in self.segments.tolist()]
        assert used == sorted(used, reverse=True), "empty segments come last"
        for (first, length), (following, more) in pairwise(self.segments.tolist()):
            apart = not more or first + length != following or following == self.cache.rows
            assert apart, "neighbours are one segment, unless one of them is fresh"
        assert keys == len(found) == len(expected)
        assert sorted(found, key=str) == sorted(expected, key=str)

    def _commit(self, start: int, frames: int, force_sink: bool) -> None:
        count = self.cache.commit(start, frames, force_sink, self.ranges)
        self.oracle.commit(start, frames, force_sink)
        written: set[int] = set()
        for fresh, row, length in self.ranges[:count].tolist():
            assert length > 0 and 2 + self.oracle.max_anchors <= row and row + length <= self.cache.rows
            assert fresh >= 0 and fresh + length <= frames * self.oracle.P
            rows = range(row, row + length)
            assert not written & set(rows), "two fresh tokens go to one row"
            written |= set(rows)
            self.content[row : row + length] = [start * self.oracle.P + fresh + i for i in range(length)]
        assert not self.ranges[count:].any(), "unused ranges are zero"

    def set_memory(self, bridge: bool, anchors: int) -> None:
        self.cache.set_memory(bridge, anchors)
        self.oracle.bridge, self.oracle.anchors = bridge, anchors

    def clear(self, start: int) -> None:
        self.cache.clear(start)
        self.oracle.clear(start)

    def check(self) -> None:
        """Pointers, integrity and spans agree."""
        oracle, cache = self.oracle, self.cache
        assert (cache.local_end, cache.global_end, cache.base) == (oracle.L, oracle.G, oracle.base)
        assert (cache.has_bridge, cache.anchors) == (oracle.bridge, oracle.anchors)
        cache.check_integrity()
        for bridge_recent, anchor_recent in ((2, 3), (1, oracle.W), (oracle.W + 5, 2)):
            cache.spans(bridge_recent, anchor_recent, self.spans)
            for span, tokens in zip(
                self.spans.tolist(), oracle.spans(bridge_recent, anchor_recent), strict=True
            ):
                for first, length in span:
                    assert first >= 0 and first + length <= cache.rows
                    assert length > 0 or first == length == 0, "unused pieces are zero"
                found = [token for first, length in span for token in self.content[first : first + length]]
                assert found == tokens
