"""What holds while a GPU's work is recorded as a graph, in whichever engine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from swiftvideo.runtime.plugins.launch import check

_capturing = RLock()


@contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic collection inside, which would free others' graphs and memory: that breaks a capture.

    One capture of the process at a time: collection is switched off for all threads.
    """
    with _capturing:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


def captured(driver: Any, stream: Any, work: Callable[[], None]) -> Any:
    """The graph of what `work` puts into a stream, for the caller to destroy. An error of `work` ends the capture."""
    mode, what = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, "capturing a graph"
    with uncollected():
        check(driver, driver.cuStreamBeginCapture(stream, mode), what)
        try:
            work()
        except BaseException:
            code, graph = driver.cuStreamEndCapture(stream)  # a code says what `work` broke
            if not int(code):
                check(driver, driver.cuGraphDestroy(graph), what)
            raise
        return check(driver, driver.cuStreamEndCapture(stream), what)
