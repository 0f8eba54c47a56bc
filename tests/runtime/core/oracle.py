"""The memory cache as the specification tells it: a plain list of the token that each slot holds.

Written from docs/algorithm.md, sections 3, 5 and 6, without rows and without a ring: tokens move when others
are evicted. It is what the C core is compared with, and its slow twin in the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Key = int | tuple[str, int]
"""An absolute token, or a memory row: ("bridge", 0..1), ("anchor", 0..)."""


class Refused(Exception):
    """The forward makes no sense in this state."""


@dataclass
class Oracle:
    """One session's cache, in the specification's letters; `slots[i]` is the absolute token in slot i."""

    P: int
    W: int
    S: int
    max_anchors: int
    base: int = 0
    slots: list[int] = field(default_factory=list)
    G: int = 0
    bridge: bool = False
    anchors: int = 0

    @property
    def L(self) -> int:
        return len(self.slots)

    def forward(
        self, start: int, frames: int, window: int, force_sink: bool
    ) -> tuple[list[Key], list[int], bool]:
        """Run one forward on a copy: its keys, the slots after it, and whether it recomputes known frames."""
        P, cap, sink = self.P, self.W * self.P, self.S * self.P
        st, new = start * P, frames * P
        end = st + new
        if not 1 <= frames <= self.W or window < 1 or not self.base <= st <= self.G:
            raise Refused("out of range")
        rec = end <= self.G and st > self.base
        slots = list(self.slots)
        le = self.L + end - self.G
        if end > self.G and new + self.L > cap:
            ev = new + self.L - cap
            le -= ev
            if le - new < sink:
                raise Refused("an ordinary forward would overwrite the sink")
            del slots[sink : sink + ev]
        ls = le - new
        if ls < 0:
            raise Refused("evicted")
        if not rec and le < sink:
            raise Refused("the sink would stay empty")
        slots += [-1] * (le - len(slots))
        ws = max(ls, sink) if rec and not force_sink else ls
        for slot in range(ws, le):
            slots[slot] = st + slot - ls

        memory: list[Key] = [("anchor", i) for i in range(self.anchors)]
        memory += [("bridge", i) for i in range(2)] if self.bridge else []
        eff = min(window, self.W) * P
        if self.S > 0:
            budget = eff - sink - len(memory)
            recent = slots[max(sink, le - budget) : le] if budget > 0 else []
        else:
            budget = max(0, eff - len(memory))
            recent = slots[max(0, le - budget) : le]
        return [*slots[:sink], *memory, *recent], slots if rec else slots[:le], rec

    def plan(self, start: int, frames: int, window: int, force_sink: bool) -> list[Key]:
        return self.forward(start, frames, window, force_sink)[0]

    def commit(self, start: int, frames: int, force_sink: bool) -> None:
        _, slots, rec = self.forward(start, frames, self.W, force_sink)
        self.slots = slots
        if not rec:
            self.G = (start + frames) * self.P

    def spans(self, bridge_recent: int, anchor_recent: int) -> list[list[int]]:
        """Tokens of: last frame, frame before, bridge-recent, sink, anchor-recent; in time order."""
        P, L = self.P, self.L
        return [
            self.slots[L - P :] if L >= P else [],
            self.slots[L - 2 * P : L - P] if L >= 2 * P else [],
            self.slots[L - min(L, bridge_recent * P) :],
            self.slots[: min(L, self.S * P)],
            self.slots[L - min(L, anchor_recent * P) :],
        ]

    def clear(self, start: int) -> None:
        self.base = self.G = start * self.P
        self.slots = []
        self.bridge, self.anchors = False, 0
