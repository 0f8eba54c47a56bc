"""Files that are replaced in one step: a name stands for a whole file, or for the one that was there before."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import UsageError

PARTIAL = r"\.[0-9a-f]{8}\.partial"
"""What follows a file's name while it is written, as a regular expression. Only a killed process leaves such a file."""


def target(path: str | Path) -> Path:
    """The file that writing to `path` would replace or make: links are followed.

    Raises UsageError where a folder, a pipe or a device is there; OSError or ValueError for a name that cannot be.
    """
    real = Path(os.path.realpath(path))  # a link may lead to where nothing is yet
    if not is_there(real):
        return real
    mode = real.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UsageError(f"{str(path)!r} is a folder: give a file's name")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{str(path)!r} is a pipe or a device: give a file's name")
    return real


def is_there(path: Path) -> bool:
    """Whether anything has this name, a link that leads nowhere included.

    Raises OSError where the system cannot tell: there Path.exists is False from Python 3.14 on, as os.path.lexists
    always was, and a name that is too long, or a disk with an error, passes for a free place.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts`, one after the other, to a file that only its owner may use, and let it take the name `path`.

    A killed process leaves the old file or the new one; nobody waits for the disk, so a power cut may leave less.
    Raises OSError or ValueError; `path` is as it was then, and no other file is left.
    """
    partial = Path(f"{path}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error tells what went wrong
            partial.unlink()
        raise
