"""What the core refuses and how it says so; saved states; the notable cases of the specification by hand."""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from swiftvideo.runtime._core import Cache
from swiftvideo.runtime.errors import IntegrityError, SettingsError, UsageError
from tests.runtime.core.mirror import Mirror


def table(rows: int = 6, columns: int = 2) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.zeros((rows, columns), np.int32)


def filled(chunks: int = 6) -> Mirror:
    mirror = Mirror(4, 12, 3, 2)
    for chunk in range(chunks):
        mirror.forward(3 * chunk, 3, 12, False)
    return mirror


def test_rows_are_bridge_anchors_sink_and_ring() -> None:
    cache = Cache(frame_tokens=16, window=12, sink=3, max_anchors=4)
    assert cache.rows == 2 + 4 + 12 * 16
    assert (cache.frame_tokens, cache.window, cache.sink, cache.max_anchors) == (16, 12, 3, 4)
    assert (cache.base, cache.local_end, cache.global_end, cache.anchors, cache.has_bridge) == (
        0,
        0,
        0,
        0,
        False,
    )


def test_a_cache_that_is_not_full_lies_in_time_order_and_is_one_segment() -> None:
    mirror = filled(3)
    assert mirror.content[4:40] == list(range(36))
    mirror.forward(9, 3, 12, False, commit=False)
    assert mirror.segments.tolist() == [[4, 36], [52, 12], *[[0, 0]] * 4]


def test_memory_displaces_the_oldest_tokens_inside_a_frame() -> None:
    mirror = filled()
    mirror.set_memory(True, 1)
    keys = mirror.forward(18, 3, 12, False)
    assert keys is not None and len(keys) == 48
    recent = sorted(key for key in keys if isinstance(key, int) and key >= 12)
    assert recent[0] == (21 - 9) * 4 + 3, "three memory tokens push out three of the oldest frame's four"


def test_a_small_window_hides_a_chunks_own_first_tokens() -> None:
    mirror = filled()
    mirror.set_memory(True, 2)
    keys = mirror.forward(18, 3, 5, False)
    assert keys is not None
    assert sorted(key for key in keys if isinstance(key, int)) == [*range(12), *range(21 * 4 - 4, 21 * 4)]


def test_a_window_smaller_than_the_memory_leaves_the_sink_and_the_memory() -> None:
    mirror = filled()
    mirror.set_memory(True, 2)
    keys = mirror.forward(18, 3, 3, False)
    assert keys is not None and len(keys) == 12 + 4


def test_without_a_sink_the_memory_alone_can_be_the_keys() -> None:
    mirror = Mirror(2, 4, 0, 4)
    mirror.forward(0, 2, 4, False)
    mirror.set_memory(True, 4)
    keys = mirror.forward(2, 2, 1, False)
    assert keys == [*(("anchor", i) for i in range(4)), ("bridge", 0), ("bridge", 1)]


def test_a_full_recache_keeps_a_global_sink_and_drops_the_tokens_over_it() -> None:
    mirror = filled()
    count = mirror.cache.commit(6, 12, False, mirror.ranges)
    assert count and mirror.ranges[0, 0] == 12, "the first three frames of the recache are dropped"
    assert mirror.ranges[:count, 2].sum() == 9 * 4
    mirror.forward(6, 12, 12, False)
    assert mirror.content[4:16] == list(range(12)), "the sink rows still hold the first frames"


def test_a_forced_recache_replaces_the_sink() -> None:
    mirror = filled()
    mirror.forward(6, 12, 12, True)
    assert mirror.content[4:16] == list(range(24, 36))
    keys = mirror.forward(18, 3, 12, False)
    assert keys is not None and min(key for key in keys if isinstance(key, int)) == 24


def test_a_forced_forward_within_the_sink_sees_the_sinks_rest_too() -> None:
    mirror = filled(1)
    keys = mirror.forward(1, 1, 12, True)
    assert keys == list(range(12))


def test_a_cleared_cache_behaves_as_a_new_one_further_on() -> None:
    mirror, fresh = filled(), Mirror(4, 12, 3, 2)
    mirror.clear(1000)
    assert (mirror.cache.local_end, mirror.cache.global_end, mirror.cache.base) == (0, 4000, 4000)
    with pytest.raises(UsageError, match="begins at frame 1000 and ends at 1000; start between them"):
        mirror.cache.plan(999, 3, 12, False, mirror.segments)
    for chunk in range(9):
        mirror.forward(1000 + 3 * chunk, 3, 9, False)
        fresh.forward(3 * chunk, 3, 9, False)
        assert mirror.segments.tolist() == fresh.segments.tolist()
        assert mirror.ranges.tolist() == fresh.ranges.tolist()


def test_far_frames_are_as_exact_as_near_ones() -> None:
    mirror = Mirror(1560, 12, 3, 4)
    mirror.clear(10**13)
    for chunk in range(6):
        mirror.forward(10**13 + 3 * chunk, 3, 7, False)
    mirror.check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 12, 3, 4), "frame_tokens 0"),
        ((16, 0, 0, 4), "window 0"),
        ((16, 3, 3, 4), "window 3, sink 3"),
        ((16, 12, -1, 4), "sink -1"),
        ((16, 12, 3, -2), "max_anchors -2"),
        ((2**31, 12, 3, 4), "32 bits"),
        ((2**20, 2**20, 3, 4), "32 bits"),
        ((16, 12, 3, 2**40), "32 bits"),
        ((2**70, 12, 3, 4), "frame_tokens does not fit 64 bits"),
    ],
)
def test_sizes_out_of_range_are_refused_with_the_value(
    arguments: tuple[int, int, int, int], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        Cache(*arguments)


def test_rows_are_numbered_with_32_bits() -> None:
    """Those of the cache, and after them as many fresh ones as its window has."""
    most = (2**31 - 1) // 4
    assert Cache(1, most, 0, most).rows == 2 * most + 2
    for sizes in ((2, most // 2 + 1, 0, 0), (1, most + 1, 0, 0), (1, 1, 0, most + 1)):
        with pytest.raises(SettingsError, match=f"or max_anchors below {most}"):
            Cache(*sizes)


@pytest.mark.parametrize(
    ("start", "frames", "window", "words"),
    [
        (18, 0, 12, "0 frames"),
        (18, 13, 12, "13 frames"),
        (19, 3, 12, "frame 19 .* ends at frame 18"),
        (-1, 3, 12, "frame -1"),
        (2, 3, 12, "frame 2: those frames were evicted; start at frame 6"),
        (18, 10, 12, "at most 9 frames"),
        (18, 3, 0, "window is 0"),
        (2**61, 3, 12, "begins at frame 0"),
        (-(2**63), 3, 12, "begins at frame 0"),
        (2**64, 3, 12, "64 bits"),
        pytest.param(1 << 20000, 3, 12, "start does not fit 64 bits", id="more digits than Python prints"),
        (18, 2**62, 12, "frames"),
    ],
)
def test_impossible_forwards_are_refused_with_the_value_and_the_remedy(
    start: int, frames: int, window: int, words: str
) -> None:
    mirror = filled()
    before = mirror.cache.state()
    with pytest.raises(UsageError, match=words):
        mirror.cache.plan(start, frames, window, False, mirror.segments)
    if window:
        with pytest.raises(UsageError, match=words):
            mirror.cache.commit(start, frames, False, mirror.ranges)
    assert mirror.cache.state() == before


def test_not_one_token_of_the_sink_is_overwritten() -> None:
    mirror = Mirror(1, 4, 3, 0)
    mirror.forward(0, 3, 4, False)
    assert mirror.forward(3, 2, 4, False) is None


def test_a_first_forward_must_cover_the_sink() -> None:
    with pytest.raises(UsageError, match="2 frames leaves the sink of 3 unwritten"):
        Cache(4, 12, 3, 0).plan(0, 2, 12, False, table())


@pytest.mark.parametrize("anchors", [-1, 3])
def test_anchors_without_rows_are_refused(anchors: int) -> None:
    with pytest.raises(SettingsError, match=f"anchors is {anchors}.*0 to 2"):
        filled().cache.set_memory(False, anchors)


LAST = (2**63 - 1) // 4 // 4 - 12
"""The last frame at which a cache of 4 tokens a frame and a window of 12 may begin."""


@pytest.mark.parametrize("start", [-1, LAST + 1, 2**62])
def test_clear_refuses_impossible_frames(start: int) -> None:
    with pytest.raises(UsageError, match=f"start is frame {start}: use 0 to {LAST}$"):
        filled().cache.clear(start)


def test_a_cache_may_begin_at_the_last_frame() -> None:
    mirror = filled()
    mirror.clear(LAST)
    mirror.forward(LAST, 3, 12, False)
    mirror.check()


@pytest.mark.parametrize("recent", [(0, 3), (2, 0), (-1, 1)])
def test_spans_refuse_no_frames(recent: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 1 frame"):
        filled().cache.spans(*recent, np.zeros((5, 3, 2), np.int32))


CALLS: list[tuple[str, int, Callable[[Cache, Any], object]]] = [
    ("segments", 12, lambda cache, buffer: cache.plan(18, 3, 12, False, buffer)),
    ("ranges", 12, lambda cache, buffer: cache.commit(18, 3, False, buffer)),
    ("out", 30, lambda cache, buffer: cache.spans(2, 6, buffer)),
]


@pytest.mark.parametrize(("name", "items", "call"), CALLS, ids=[name for name, _, _ in CALLS])
def test_wrong_buffers_are_refused(name: str, items: int, call: Callable[[Cache, Any], object]) -> None:
    read_only = np.zeros(items, np.int32)
    read_only.flags.writeable = False
    wrong: list[Any] = [
        np.zeros(items - 1, np.int32),
        np.zeros(items, np.int64),
        np.zeros(items, np.uint32),
        np.zeros(items, np.float32),
        np.zeros(items, ">i4"),
        np.zeros((items, 2), np.int32)[:, 0],
        read_only,
        bytes(4 * items),
        bytearray(4 * items),
        [0] * items,
        None,
    ]
    cache = filled().cache
    before = cache.state()
    for buffer in wrong:
        with pytest.raises(UsageError, match=f"{name} .*{items} int32"):
            call(cache, buffer)
    assert cache.state() == before
    for buffer in (np.zeros(items, np.int32), array.array("i", [0] * items), (ctypes.c_int32 * items)()):
        cache.restore(before)
        call(cache, buffer)


@pytest.mark.parametrize(("name", "items", "call"), CALLS, ids=[name for name, _, _ in CALLS])
def test_a_buffer_between_two_integers_is_refused(
    name: str, items: int, call: Callable[[Cache, Any], object]
) -> None:
    crooked = memoryview(bytearray(4 * items + 1))[1:].cast("i")
    with pytest.raises(UsageError, match=f"{name} does not lie at a multiple of 4 bytes"):
        call(filled().cache, crooked)
    call(filled().cache, memoryview(bytearray(4 * items)).cast("i"))


def test_a_buffer_is_released_after_every_call() -> None:
    mirror, buffer = filled(), array.array("i", [0] * 12)
    mirror.cache.plan(18, 3, 12, False, buffer)
    with pytest.raises(UsageError):
        mirror.cache.plan(99, 3, 12, False, buffer)
    buffer.append(1)  # a BufferError while an export is left


def test_arguments_have_names_and_are_counted() -> None:
    cache = filled().cache
    assert cache.plan(start=18, frames=3, window=12, force_sink=False, segments=table()) == 48
    with pytest.raises(TypeError, match="misses argument 'segments'"):
        cache.plan(18, 3, 12, False)
    with pytest.raises(TypeError, match="no argument 'keys'"):
        cache.plan(18, 3, 12, False, keys=table())
    with pytest.raises(TypeError, match="'start' twice"):
        cache.plan(18, 3, 12, False, start=3)
    with pytest.raises(TypeError, match="takes 5 arguments but 6"):
        cache.plan(18, 3, 12, False, table(), 1)
    with pytest.raises(TypeError):
        cache.plan("18", 3, 12, False, table())
    assert cache.plan(np.int64(18), 3, np.int32(12), np.False_, table()) == 48


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("start", lambda cache: cache.plan(2**64, 3, 12, False, table())),
        ("frames", lambda cache: cache.plan(18, 2**64, 12, False, table())),
        ("window", lambda cache: cache.plan(18, 3, 2**64, False, table())),
        ("start", lambda cache: cache.commit(-(2**64), 3, False, table(4, 3))),
        ("frames", lambda cache: cache.commit(18, 2**64, False, table(4, 3))),
        ("bridge_recent", lambda cache: cache.spans(2**64, 6, table(15))),
        ("anchor_recent", lambda cache: cache.spans(2, 2**64, table(15))),
        ("anchors", lambda cache: cache.set_memory(True, 2**64)),
        ("start", lambda cache: cache.clear(2**64)),
        ("an integer of the state", lambda cache: cache.restore([*cache.state()[:-1], 2**64])),
    ],
)
def test_an_integer_beyond_64_bits_is_named(name: str, call: Callable[[Cache], object]) -> None:
    cache = filled().cache
    before = cache.state()
    with pytest.raises(UsageError, match=f"^{name} does not fit 64 bits: pass a smaller integer$"):
        call(cache)
    assert cache.state() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda cache, both: cache.plan(18, 3, 12, both, table()),
        lambda cache, both: cache.commit(18, 3, both, table(4, 3)),
        lambda cache, both: cache.set_memory(both, 1),
    ],
)
def test_what_is_neither_true_nor_false_is_refused(call: Callable[[Cache, Any], object]) -> None:
    cache = filled().cache
    before = cache.state()
    with pytest.raises(ValueError, match="truth value"):
        call(cache, np.array([True, False]))
    assert cache.state() == before


def test_attributes_are_read_only_and_the_type_is_sealed() -> None:
    cache = filled().cache
    with pytest.raises(AttributeError):
        cache.local_end = 3
    with pytest.raises(AttributeError):
        cache.other = 3
    with pytest.raises(TypeError):
        type("Sub", (Cache,), {})
    assert "local_end=48, global_end=72" in repr(cache)


@pytest.mark.parametrize("sizes", [(5, 12, 3, 2), (4, 9, 3, 2), (4, 12, 1, 2), (4, 12, 3, 0)])
def test_a_state_of_other_sizes_is_refused(sizes: tuple[int, int, int, int]) -> None:
    P, W, S, anchors = sizes
    words = (
        f"frame_tokens {P}, window {W}, sink {S}, max_anchors {anchors}, this one has 4, 12, 3, 2: restore"
    )
    with pytest.raises(UsageError, match=words):
        filled().cache.restore(Cache(*sizes).state())


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(UsageError, match="2 integers"):
        filled().cache.restore((4, 12))
    for wrong in (5, None, iter([]), ["4", *filled().cache.state()[1:]]):
        with pytest.raises(TypeError):
            filled().cache.restore(wrong)


@pytest.mark.parametrize(
    ("position", "values"),
    [
        ("base", (-4, 2, 28, 80, 2**63 - 4)),
        ("local_end", (52, -4, 4, 0)),
        ("global_end", (70, 44, 2**63 - 4)),
        ("anchors", (3, -1)),
        ("has_bridge", (2,)),
    ],
)
def test_a_state_that_contradicts_itself_is_refused_and_changes_nothing(
    position: str, values: tuple[int, ...]
) -> None:
    cache = filled().cache
    before = cache.state()
    order = ["base", "local_end", "global_end", "anchors", "has_bridge"]
    for value in values:
        broken = list(before)
        broken[4 + order.index(position)] = value
        with pytest.raises(IntegrityError):
            cache.restore(broken)
        assert cache.state() == before
        cache.check_integrity()
