"""Files that a command will write, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from swiftvideo.runtime.errors import SwiftVideoError, UsageError


class OutputError(SwiftVideoError):
    """A file cannot be written where it was asked for."""


def check_output(path: str | Path, suffixes: tuple[str, ...]) -> Path:
    """`path` if a file with one of `suffixes` can be written there; call it before any long work.

    Raises:
        UsageError: another suffix, or a folder is in the way.
        OutputError: the folder is missing, or not writable.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"output {str(path)!r}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder: give a file's name")
    if not path.parent.is_dir():
        raise OutputError(f"folder {str(path.parent)!r} is not there: make it first, mkdir -p {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{str(path)!r} cannot be written: change its permissions or choose another folder")
    return path
