"""What files hold, read again when they change, without a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from swiftvideo.runtime.errors import SettingsError

log = logging.getLogger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int]


class Reread(Generic[T]):
    """The content of files. Where they are wrong later, what they held before stays; the log says it once.

    Args:
        what: it is, for the log.
        paths: of the files.
        read: reads them. Raises SettingsError where they are wrong.

    Raises SettingsError where the files cannot be read or are wrong at the start.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._wrong = ""
        self._stamps = self._look()
        self.value = read()

    def refresh(self) -> bool:
        """Look whether the files changed, and whether there is another `value` therefore. From any thread."""
        with self._lock:
            try:
                stamps = self._look()
                changed = stamps != self._stamps
                if changed:
                    self.value, self._stamps = self._read(), stamps
            except SettingsError as error:
                if str(error) != self._wrong:
                    log.error("what was read before stays, until this is right: %s", error)
                self._wrong = str(error)
                return False
            if changed or self._wrong:
                log.info("%s: %s", self._what, "read again" if changed else "as it was before")
            self._wrong = ""
            return changed

    def _look(self) -> list[Stamp]:
        return [self._stamp(path) for path in self._paths]

    def _stamp(self, path: Path) -> Stamp:
        try:
            status = path.stat()
        except OSError as error:
            raise SettingsError(f"{self._what}: {str(path)!r} cannot be read: {error.strerror}") from error
        return status.st_mtime_ns, status.st_size, status.st_ino
