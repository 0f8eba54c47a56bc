"""Where bundles are written: what is checked before the work, and how a finished bundle takes its place.

    place = check_destination("wan.bundle", overwrite=True)
    with writing(place), folders_above(place), work_folder(place) as work:
        ...  # into `work`, a folder beside it
        put_in_place(work, place, overwrite=True)

Nothing but a bundle is ever replaced, and the old one is deleted only when the new one is there. What appears at the
place meanwhile stays there, and so does the finished bundle, under another name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swiftvideo.runtime.errors import SettingsError, SwiftVideoError
from swiftvideo.runtime.files import is_there
from swiftvideo.runtime.manifest import GRAPHS, MANIFEST_NAME

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, or what one may write to it."""

BUILT = re.compile(
    r"\.plans-.*|trt/.*\.(plan|layers\.json)|kernels/.*\.(cubin|json)|manifest\.json(\.partial)?|(.*/)?\.DS_Store"
)
"""What the manifest itself and the building of plans add to a bundle, also when it was interrupted, and macOS's Finder
to a folder that it shows."""

UNFINISHED = re.compile(
    rf"onnx/({'|'.join(GRAPHS)}|decoder)\.(onnx|data)|tokenizer\.json|manifest\.json\.partial"
)
"""What an export has in its hidden folder until the manifest, which comes last, is written."""


class BundleWriteError(SwiftVideoError):
    """A bundle cannot be written where it was asked for."""


def check_destination(out: str | Path, overwrite: bool = False) -> Path:
    """The folder that a bundle may be written to, links resolved; call it before any long work.

    Raises SettingsError for a folder that is not empty, unless `overwrite` is set and it holds a bundle and nothing
    else, and where no folder can be made or replaced: below a file, at a mount point, around the current folder, under
    a name that is too long.
    """
    place = Path(os.path.realpath(out))
    parent = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    try:
        there = is_there(place)
        is_there((place.parent if there else parent) / f".{place.name}-12345678-old")  # its longest name
    except OSError as error:
        raise SettingsError(f"{out} cannot be a bundle's folder: {error}; choose another folder") from error
    if place.is_symlink():
        raise SettingsError(f"{out} leads nowhere, as its links go in a circle: choose another folder")
    if not parent.is_dir():
        raise SettingsError(f"{parent} is a file, so {out} cannot be a bundle's folder: choose another one")
    if there:
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
    _check_bundle(place, out)


def _check_bundle(folder: Path, out: str | Path) -> None:
    """Raise SettingsError, which calls it `out`, unless a folder holds a bundle and nothing else."""
    manifest = _manifest(folder / MANIFEST_NAME)
    if manifest is None:
        raise SettingsError(f"{out} holds no bundle, so it is not overwritten: choose another folder")
    stray = sorted(
        name for name in _names(folder) if name not in manifest["files"] and not BUILT.fullmatch(name)
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


def put_in_place(work: Path, place: Path, overwrite: bool = False) -> None:
    """Rename the finished bundle `work` to `place`, after checking once more what is there; a bundle there is deleted.

    Raises BundleWriteError where something else is there by now or a rename fails: what was there is there again, and
    the finished bundle beside it under a name that the message says.
    """
    old = work.with_name(f"{work.name}-old")
    try:
        _replace(work, place, old, overwrite)
    except (SettingsError, OSError) as error:
        kept = [f"the finished bundle is {_show(work)}"]
        if os.path.lexists(old):  # something else took its place
            kept.append(f"what {place} was is {_show(old)}")
        raise BundleWriteError(
            f"{place} changed during the export, or cannot be replaced ({error}); {' and '.join(kept)}: move that to "
            "where you want it"
        ) from error


def _replace(work: Path, place: Path, old: Path, overwrite: bool) -> None:
    if check_destination(place, overwrite) != place:
        raise SettingsError(f"{place} is a link now")
    try:
        if overwrite and is_there(place):
            place.rename(old)
            if any(old.iterdir()):
                _check_bundle(old, place)  # nobody adds to it by its name any more
        work.rename(place)  # the system refuses where a folder there is not empty
    except BaseException:
        if is_there(work) and is_there(old):
            old.rename(place)
        raise
    finally:
        if not is_there(work):
            shutil.rmtree(old, ignore_errors=True)


def _show(hidden: Path) -> Path:
    """Rename a hidden folder to the same name without the dot."""
    return hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))


@contextlib.contextmanager
def work_folder(place: Path) -> Iterator[Path]:
    """A new hidden folder beside `place`, which goes where what is inside fails, as those of killed exports go first.

    It is locked as long as it is written.
    """
    prefix = f".{place.name}-"
    ours = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")
    for left in place.parent.glob(".*"):
        if ours.fullmatch(left.name):
            _remove_unfinished(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        with _locked(work, wait=True):
            yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _remove_unfinished(folder: Path) -> None:
    """Remove a folder that holds an unfinished bundle and nothing else, and that no export has locked."""
    try:
        with _locked(folder, wait=False) as alone:
            # One without graphs may be an export's that is about to lock it.
            if alone and (folder / "onnx").is_dir() and all(map(UNFINISHED.fullmatch, _names(folder))):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # a file, a link, another user's, or gone by now: none of this is an export's left
        return


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder; False where another process has done so and `wait` is not set, or on a disk without locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


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
