"""Long random lives of a cache, against the oracle."""

from __future__ import annotations

import os

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.runtime.core.mirror import Mirror


class CacheLife(RuleBasedStateMachine):
    """Chunks, switches with both recaches, cuts, memory changes, saves, and forwards that make no sense."""

    @initialize(
        frame_tokens=st.integers(1, 5),
        window=st.integers(1, 13),
        sink=st.integers(0, 4),
        chunk=st.integers(1, 4),
        max_anchors=st.integers(0, 4),
    )
    def start(self, frame_tokens: int, window: int, sink: int, chunk: int, max_anchors: int) -> None:
        self.window = max(window, sink + 1)
        self.chunk = max(1, min(max(chunk, sink), self.window - sink))
        self.mirror = Mirror(frame_tokens, self.window, sink, max_anchors)
        self.at = 0
        self.odd = False

    @property
    def frames(self) -> int:
        """A first chunk has to cover the sink."""
        return max(self.chunk, self.mirror.oracle.S) if self.mirror.oracle.L == 0 else self.chunk

    @rule(window=st.integers(1, 14), denoise=st.integers(1, 4), repeat=st.integers(1, 8))
    def make_chunks(self, window: int, denoise: int, repeat: int) -> None:
        for _ in range(repeat):
            frames = self.frames
            for step in range(denoise):
                keys = self.mirror.forward(self.at, frames, window, False, commit=step == denoise - 1)
                assert keys is not None
            self.at += frames

    @precondition(lambda self: self.mirror.oracle.L > 0)
    @rule(micro=st.integers(1, 13), anchors=st.integers(0, 4))
    def switch_with_micro_recache(self, micro: int, anchors: int) -> None:
        self.mirror.set_memory(True, min(anchors, self.mirror.oracle.max_anchors))
        frames = min(micro, self.mirror.oracle.L // self.mirror.oracle.P)
        self.mirror.forward(self.at - frames, frames, self.window, False)

    @precondition(lambda self: self.mirror.oracle.L > 0)
    @rule(global_sink=st.booleans())
    def switch_with_full_recache(self, global_sink: bool) -> None:
        self.mirror.set_memory(False, self.mirror.oracle.anchors)
        begin = self.mirror.oracle.base // self.mirror.oracle.P
        frames = self.mirror.oracle.L // self.mirror.oracle.P
        assert frames == min(self.window, self.at - begin) or self.odd, "fewer than fit are kept"
        keys = self.mirror.forward(self.at - frames, frames, self.window, not global_sink)
        assert keys is not None

    @rule(bridge=st.booleans(), anchors=st.integers(0, 4))
    def change_memory(self, bridge: bool, anchors: int) -> None:
        self.mirror.set_memory(bridge, min(anchors, self.mirror.oracle.max_anchors))

    @rule(gap=st.integers(0, 1000) | st.integers(10**6, 10**12))
    def cut(self, gap: int) -> None:
        self.at = gap
        self.odd = False
        self.mirror.clear(gap)

    @rule(
        back=st.integers(-3, 20), frames=st.integers(-1, 15), window=st.integers(-1, 15), force=st.booleans()
    )
    def odd_forward(self, back: int, frames: int, window: int, force: bool) -> None:
        self.odd |= self.mirror.forward(self.at - back, frames, window, force) is not None
        self.at = self.mirror.oracle.G // self.mirror.oracle.P

    @precondition(lambda self: 0 < self.mirror.oracle.L == self.mirror.oracle.G - self.mirror.oracle.base)
    @rule(frames=st.integers(1, 13))
    def start_over(self, frames: int) -> None:
        """A forward from the very beginning is never a recache: it rewrites the sink and rewinds the pointers."""
        begin = self.mirror.oracle.base // self.mirror.oracle.P
        self.mirror.forward(begin, min(frames, self.at - begin), self.window, False)
        self.at = self.mirror.oracle.G // self.mirror.oracle.P

    @rule()
    def save_and_restore(self) -> None:
        other = type(self.mirror.cache)(
            self.mirror.oracle.P, self.mirror.oracle.W, self.mirror.oracle.S, self.mirror.oracle.max_anchors
        )
        other.restore(self.mirror.cache.state())
        assert other.state() == self.mirror.cache.state()
        self.mirror.cache = other

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "mirror"):
            self.mirror.check()


# The sanitizers make it several times slower.
CacheLife.TestCase.settings = settings(
    max_examples=30 if "SWIFTVIDEO_CORE" in os.environ else 80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCacheLife = CacheLife.TestCase
