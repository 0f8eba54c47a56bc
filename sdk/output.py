"""Files that a command will write, checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from swiftvideo.runtime.errors import SwiftVideoError, UsageError
from swiftvideo.runtime.files import target


class OutputError(SwiftVideoError):
    """A file cannot be written where it was asked for."""


def check_output(path: str | Path, suffixes: tuple[str, ...]) -> Path:
    """`path` if a file with one of `suffixes` can be written there; call it before any long work.

    Raises:
        UsageError: another suffix, or something that is no file is in the way.
        OutputError: the folder is missing or not writable, or the name is impossible.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"output {str(path)!r}: the name must end in {' or '.join(suffixes)}")
    try:
        real = target(path)
    except UsageError as error:
        raise UsageError(f"output {error}") from error
    except (OSError, ValueError) as error:
        raise OutputError(f"output {str(path)!r}: {error}; choose another name") from error
    folder = path.parent if real.parent == Path(os.path.realpath(path.parent)) else real.parent
    if not folder.is_dir():
        raise OutputError(f"folder {str(folder)!r} is not there: make it first, mkdir -p {folder}")
    if not os.access(real if real.exists() else folder, os.W_OK):
        raise OutputError(f"{str(path)!r} cannot be written: change its permissions or choose another folder")
    return path
