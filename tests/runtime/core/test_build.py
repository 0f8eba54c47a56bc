"""The build itself: which file is under test, what it leaks, and what its stub and its sources promise."""

from __future__ import annotations

import gc
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from swiftvideo.runtime import _core
from swiftvideo.runtime.errors import UsageError

SOURCES = Path(__file__).parents[3] / "runtime" / "csrc"


def test_the_sanitized_build_is_the_one_under_test() -> None:
    tree = os.environ.get("SWIFTVIDEO_CORE")
    if tree is not None:
        assert Path(_core.__file__).is_relative_to(tree)


def test_it_is_built_for_the_stable_abi() -> None:
    assert Path(_core.__file__).name == "_core.abi3.so"


def test_the_core_proper_is_plain_c() -> None:
    text = (SOURCES / "cache.c").read_text() + (SOURCES / "cache.h").read_text()
    assert not re.search(r"Python\.h|\b(malloc|calloc|realloc|free|alloca)\s*\(", text)


def test_every_buffer_that_is_taken_is_released() -> None:
    text = (SOURCES / "module.c").read_text()
    for body in re.findall(r"^static PyObject \*cache_\w+_call\(.*?^}", text, re.M | re.S):
        assert body.count("take_buffer(") == body.count("PyBuffer_Release(")


@pytest.mark.skipif("SWIFTVIDEO_CORE" in os.environ, reason="the sanitizer counts for itself")
def test_calls_and_objects_leave_no_memory_behind() -> None:
    segments, ranges = np.zeros((6, 2), np.int32), np.zeros((4, 3), np.int32)

    def work() -> None:
        for _ in range(200):
            cache = _core.Cache(4, 12, 3, 2)
            for chunk in range(8):
                cache.plan(3 * chunk, 3, 12, False, segments)
                cache.commit(3 * chunk, 3, False, ranges)
            cache.restore(cache.state())
            cache.check_integrity()
            for bad in (2**70, 10**6):
                try:
                    cache.plan(bad, 3, 12, False, segments)
                except UsageError:
                    continue
                raise AssertionError("not refused")

    work()
    gc.collect()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        work()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2000
