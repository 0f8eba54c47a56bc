"""What holds while a GPU's work is recorded as a graph, in whichever engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

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
