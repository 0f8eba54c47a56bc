"""Where bundles are written: what is checked before the work, and how a finished bundle takes its place.

    place = check_destination("wan.bundle", overwrite=True)
    with writing(place): ...  # into `work`, a folder beside it
    put_in_place(work, place)

Nothing but a bundle is ever replaced, and the old one is deleted only when the new one is there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swiftvideo.runtime.errors import SettingsError, SwiftVideoError
from swiftvideo.runtime.manifest import MANIFEST_NAME

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, or what one may write to it."""

BUILT = re.compile(
    r"\.plans-.*|trt/.*\.(plan|layers\.json)|kernels/.*\.(cubin|json)|manifest\.json(\.partial)?"
)
"""What the manifest itself and the building of plans add to a bundle, also when it was interrupted."""


class BundleWriteError(SwiftVideoError):
    """A bundle cannot be written where it was asked for."""


def check_destination(out: str | Path, overwrite: bool = False) -> Path:
    """The folder that a bundle may be written to, links resolved; call it before any long work.

    Raises SettingsError for a folder that is not empty, unless `overwrite` is set and it holds a bundle and nothing
    else, and where no folder can be made or replaced: below a file, at a mount point, around the current folder.
    """
    try:
        place = Path(out).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise SettingsError(f"{out} leads nowhere ({error}): choose another folder") from error
    parent = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if not parent.is_dir():
        raise SettingsError(f"{parent} is a file, so {out} cannot be a bundle's folder: choose another one")
    if place.exists():
        _check_replaceable(place, out, overwrite)
        parent = place.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SettingsError(f"{parent} cannot be written: change its permissions or choose another folder")
    return place


def _check_replaceable(place: Path, out: str | Path, overwrite: bool) -> None:
    if os.path.ismount(place):
        raise SettingsError(f"{out} is a mount point, which cannot be replaced: choose a folder inside it")
    if Path.cwd().is_relative_to(place):
        raise SettingsError(
            f"{out} holds the current folder, which cannot be replaced: choose a folder inside it"
        )
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise SettingsError(f"{place} cannot be replaced: change its permissions or choose another folder")
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise SettingsError(
            f"{out} exists and is not empty: choose another folder, or pass overwrite (--overwrite)"
        )
    manifest = _manifest(place / MANIFEST_NAME)
    if manifest is None:
        raise SettingsError(f"{out} holds no bundle, so it is not overwritten: choose another folder")
    stray = sorted(
        name for name in _names(place) if name not in manifest["files"] and not BUILT.fullmatch(name)
    )
    if stray:
        raise SettingsError(
            f"{out} holds {stray[0]}, which its manifest does not list, so it is not overwritten: move that away, or "
            "choose another folder"
        )


def _manifest(path: Path) -> dict[str, Any] | None:
    """A manifest of ours of any version, None for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"schema": int, "geometry": dict, "files": dict}
    ours = isinstance(content, dict) and all(
        isinstance(content.get(key), kind) for key, kind in kinds.items()
    )
    return content if ours else None


def _names(folder: Path) -> Iterator[str]:
    """Everything below a folder that is no folder itself, a link to one included."""
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in (*files, *links))


def put_in_place(work: Path, place: Path) -> None:
    """Rename the finished bundle `work` to `place`; what was there comes back where that fails, else is deleted."""
    old = work.with_name(f"{work.name}-old")
    try:
        if place.exists():
            place.rename(old)
        work.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    finally:
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def folders_above(place: Path) -> Iterator[None]:
    """The folders that `place` needs above it; those that are made here go where what is inside fails."""
    missing = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else's files are in one
            for folder in missing:
                folder.rmdir()
        raise


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside into BundleWriteError naming the place."""
    try:
        yield
    except SwiftVideoError:  # some of them are OSErrors too
        raise
    except OSError as error:
        remedy = "free some space there" if error.errno in FULL else "check the disk and its permissions"
        raise BundleWriteError(
            f"{place} cannot be written: {error}; {remedy} or choose another folder"
        ) from error
