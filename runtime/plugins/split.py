"""How the attention's tiles are divided among programs, so that the last of them do not leave most of a GPU idle.

4680 queries of 12 heads are 444 tiles of 128; a GPU that runs 132 at once takes four rounds for 3.36 rounds' worth of
work. The tiles of the unfilled round are split along the keys into pieces, which a second launch merges.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel import KernelSpec
from .launch import Launcher

MOST_PIECES = 8
"""Of a tile."""
MOST_PARTIALS = 512
"""Pieces in all: what `workspace` has room for."""
START, MERGE = 8, 6
"""What a program costs beyond its blocks of keys, and the second launch, in blocks of keys; estimates for Hopper."""


def workspace(spec: KernelSpec) -> int:
    """Bytes that pieces' results need at most, on any GPU: float32 sums, largest logits and totals."""
    queries, _, width, _ = spec.tile
    return MOST_PARTIALS * queries * (width + 2) * 4


@dataclass(frozen=True, slots=True)
class Phase:
    """One launch of the kernel: programs of the grid, and its last three arguments."""

    programs: int
    unsplit: int
    """Tiles that one program computes, the first ones."""
    pieces: int
    """Programs for each of the others."""
    merging: int
    """1: the pieces' results are merged, 0: they are computed."""

    @property
    def arguments(self) -> tuple[int, int, int]:
        """The kernel's last arguments."""
        return self.unsplit, self.pieces, self.merging


@dataclass(frozen=True, slots=True)
class Split:
    """A kernel's tiles on a GPU.

    queries, keys, width: of a tile, and of a row as it computes it. merged: queries of a tile that one merging program
    takes. slots: programs that the GPU runs at once.
    """

    queries: int
    keys: int
    width: int
    merged: int
    slots: int

    @classmethod
    def of(cls, launcher: Launcher) -> Split:
        """Of a loaded attention kernel on the current GPU."""
        queries, keys, width, merged = launcher.spec.tile
        return cls(queries, keys, width, merged, launcher.slots())

    def tiles(self, queries: int, heads: int, batch: int) -> int:
        """How many tiles an attention of `queries` has."""
        return -(-queries // self.queries) * heads * batch

    def phases(self, queries: int, heads: int, batch: int, rows: int) -> list[Phase]:
        """The launches for an attention of `queries` over at most `rows` cached rows and as many fresh ones."""
        tiles = self.tiles(queries, heads, batch)
        rest = tiles % self.slots
        blocks = (rows + queries) / self.keys
        pieces = min(range(1, MOST_PIECES + 1), key=lambda n: self._cost(rest, n, blocks))
        return self.divided(tiles, rest, pieces)

    def divided(self, tiles: int, rest: int, pieces: int) -> list[Phase]:
        """The launches for `tiles`, the last `rest` of them in so many pieces."""
        if pieces == 1:
            return [Phase(tiles, tiles, 1, 0)]
        unsplit, each = tiles - rest, self.queries // self.merged
        return [
            Phase(unsplit + rest * pieces, unsplit, pieces, 0),
            Phase(rest * each, unsplit, pieces, 1),
        ]

    def _cost(self, rest: int, pieces: int, blocks: float) -> float:
        """Time for the tiles of the unfilled round, in blocks of keys."""
        if rest * pieces > MOST_PARTIALS and pieces > 1:
            return float("inf")
        rounds = -(-rest * pieces // self.slots)
        return rounds * (blocks / pieces + START) + (MERGE if pieces > 1 else 0)
