"""The memory core (runtime/csrc): which cache rows a forward reads and writes.

Rows of a layer's cache: ``[2 bridge | max_anchors | sink S*P | ring (W-S)*P]``. A token of the ring has the row
``sink_end + (absolute - base - S*P) mod ring``. Everything is in tokens unless it is named frames; "algorithm.md 3"
is the section "One forward over the cache" of docs/algorithm.md.
"""

from collections.abc import Sequence
from typing import final

from typing_extensions import Buffer

@final
class Cache:
    """Rows of one session's memory cache (one for all layers and for all items of a batch in lock-step).

    Args:
        frame_tokens: P, tokens of a latent frame.
        window: W, frames that the cache holds, sink included.
        sink: S, first frames, which stay; below `window`.
        max_anchors: rows kept for anchors.

    Raises:
        SettingsError: a size is out of range, or rows would not fit 32 bits.
    """

    def __new__(cls, frame_tokens: int, window: int, sink: int, max_anchors: int) -> Cache: ...
    @property
    def rows(self) -> int:
        """R: rows of a layer's cache."""

    @property
    def frame_tokens(self) -> int:
        """P: tokens of a latent frame."""

    @property
    def window(self) -> int:
        """W: frames that the cache holds, sink included."""

    @property
    def sink(self) -> int:
        """S: first frames, which stay."""

    @property
    def max_anchors(self) -> int:
        """Rows kept for anchors."""

    @property
    def base(self) -> int:
        """Absolute token of slot 0: 0 until `clear`."""

    @property
    def local_end(self) -> int:
        """L: tokens in use."""

    @property
    def global_end(self) -> int:
        """G: absolute end, in tokens."""

    @property
    def anchors(self) -> int:
        """Anchor rows that are keys."""

    @property
    def has_bridge(self) -> bool:
        """Whether the bridge rows are keys."""

    def plan(self, start: int, frames: int, window: int, force_sink: bool, segments: Buffer) -> int:
        """Find the keys of a forward (algorithm.md 3); the cache does not change.

        Args:
            start: absolute latent frame of the forward's first frame, at most the cache's end.
            frames: F, latent frames of the forward, 1 to W.
            window: frames that it may look back over, itself and the sink included; above W counts as W.
            force_sink: a forward of known frames may rewrite the sink (full recache without a global sink).
            segments: int32 [6,2], receives (start, length) in the row space [cache 0..R | fresh R..R+F*P], zero padded.
                No segment crosses R.

        Returns:
            The number of keys, the sum of the lengths. Planning a committed forward again names the same tokens.

        Raises:
            UsageError: the frames were evicted, were skipped, or do not fit; `segments` is no such buffer.
        """

    def commit(self, start: int, frames: int, force_sink: bool, ranges: Buffer) -> int:
        """Take a forward's tokens in and move the pointers. The caller copies the rows.

        Args:
            start, frames, force_sink: as for `plan`.
            ranges: int32 [4,3], receives (fresh start, row start, length) in time order, zero padded.

        Returns:
            The number of ranges. Fresh tokens in no range are dropped (a recache does not rewrite the sink).

        Raises:
            UsageError: as `plan`.
        """

    def spans(self, bridge_recent: int, anchor_recent: int, out: Buffer) -> None:
        """Name the rows that the injection averages (algorithm.md 5 and 6).

        Args:
            bridge_recent, anchor_recent: frames; more than there are counts as all.
            out: int32 [5,3,2], receives (start, length), in time order and zero padded, of: the last frame, the frame
                before, the bridge's recent frames, the sink, the anchor's recent frames. Empty where there are none.

        Raises:
            UsageError: a count below 1, or `out` is no such buffer.
        """

    def set_memory(self, bridge: bool, anchors: int) -> None:
        """Say which memory rows are keys: both bridge rows or none, and the first `anchors` anchor rows.

        Raises:
            SettingsError: `anchors` is not in 0 to max_anchors.
        """

    def clear(self, start: int) -> None:
        """Empty the cache, memory rows included; the next forward starts at absolute latent frame `start`.

        Raises:
            UsageError: `start` is negative or astronomically large.
        """

    def check_integrity(self) -> None:
        """Claim every row in use, once and in its own part.

        Raises:
            IntegrityError: the cache contradicts itself.
        """

    def state(self) -> tuple[int, ...]:
        """Sizes and pointers: (P, W, S, max_anchors, base, local_end, global_end, anchors, has_bridge)."""

    def restore(self, state: Sequence[int]) -> None:
        """Take a `state()` of a cache of the same sizes; on error nothing changes.

        Raises:
            UsageError: the wrong number of integers, or other sizes.
            IntegrityError: the pointers contradict each other.
        """
