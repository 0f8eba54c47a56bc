"""Commands that are ended by a signal while they work."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from signal import Signals


def interrupted(
    child: subprocess.Popen[str],
    number: Signals,
    ready: Callable[[], object],
    within: float,
    ends: float = 120.0,
) -> tuple[str, str]:
    """What `child` says until its end, after a signal as soon as it is `ready`.

    within: seconds until it is; ends: seconds until its end after the signal.
    """
    try:
        deadline = time.monotonic() + within
        while not ready():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(number)
        return child.communicate(timeout=ends)
    finally:
        child.kill()
