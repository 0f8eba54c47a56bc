"""Snapshots of sessions on disk: safetensors for what is large, one JSON file that makes a snapshot valid.

ID.N.session        the runtime's own snapshot after chunk N - 1
ID.N.chunks         chunks that the client had not presented, as they were sent, and the text of ID.json
ID.json             everything else, and N; written last

While a file is written it has a longer name (`files.PARTIAL`), which a killed server leaves behind. All other files of
the folder are somebody else's and are left alone.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from swiftvideo.runtime import files, tensorfile
from swiftvideo.runtime.errors import SettingsError, SwiftVideoError, UsageError
from swiftvideo.runtime.plain import fits

from .session import Kept

log = logging.getLogger(__name__)

FORMAT = 1
CHUNKS_FORMAT = "swiftvideo-chunks-2"
OURS = re.compile(rf"([0-9a-f]{{16}})\.(?:json|\d+\.(?:session|chunks))(?:{files.PARTIAL})?")
"""Names of our files; they begin with a session's id."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot's JSON."""

    id: str
    token_hash: str
    client: str
    index: int
    """Chunks made when it was taken."""
    credits: int
    encoding: int
    linger: float
    chunks: int
    presented: int
    applied: int
    """Number of the prompt in force."""
    prompts: list[tuple[str, int, str, int]]
    """Id, number, text and `heard` of those that the client may send again."""
    format: int = FORMAT

    def json(self) -> str:
        """All of it."""
        return json.dumps({name: getattr(self, name) for name in Stored.__slots__})


class Store:
    """A folder of snapshots. Methods block: call them in a worker thread.

    Args:
        folder: made if missing, readable by its owner only.
        age: seconds after which a snapshot is deleted.
        space: bytes beyond which the oldest snapshots are deleted.

    Raises SwiftVideoError where the folder cannot be made or written to, and SettingsError where others can read what
    is written to it.
    """

    def __init__(self, folder: Path, age: float, space: int) -> None:
        self.folder = folder
        self.used = 0
        """Bytes of all snapshots."""
        self._age = age
        self._space = space
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            mode = folder.stat().st_mode & 0o777
        except OSError as error:
            raise SwiftVideoError(
                f"snapshots {str(folder)!r} cannot be made ({error}): name a folder"
            ) from error
        if mode & 0o077:
            raise SettingsError(
                f"snapshots {str(folder)!r} is open to others (mode {mode:04o}), and snapshots hold prompts and "
                "frames: name a folder in it that is not there yet, or chmod 700"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SwiftVideoError(
                f"snapshots {str(folder)!r} cannot be written to: name a folder of your own"
            )

    @property
    def full(self) -> bool:
        """Whether snapshots take more than they may."""
        return self.used > self._space

    def session_path(self, id: str, index: int) -> str:
        """Where the runtime writes."""
        return str(self._paths(id, index)[0])

    def _paths(self, id: str, index: int) -> tuple[Path, Path, Path]:
        """Files of a whole snapshot: session, chunks, document."""
        return (
            self.folder / f"{id}.{index}.session",
            self.folder / f"{id}.{index}.chunks",
            self.folder / f"{id}.json",
        )

    def write(self, stored: Stored, kept: list[Kept], living: Collection[str] = ()) -> None:
        """Complete the snapshot whose session file is there, delete the one before, and make room; see `expire`.

        Where that cannot be, the one before stays, and nothing of this one.
        """
        arrays = {}
        for item in kept:
            arrays[f"{item.index}.applied"] = np.frombuffer(item.applied, np.uint8)
            arrays[f"{item.index}.chunk"] = np.frombuffer(item.chunk, np.uint8)
        session, chunks, document = self._paths(stored.id, stored.index)
        text, before = stored.json(), _size(document)
        self.used += _size(session)
        try:
            tensorfile.write(chunks, CHUNKS_FORMAT, text, arrays)
            self.used += _size(chunks)
            files.replace(document, [text.encode()])
        except BaseException:
            for path in (session, chunks):  # on a full disk they would take the room of the next one
                self._unlink(path)
            raise
        self.used += _size(document) - before
        self._drop(stored.id, keep={session, chunks, document})
        if self.full:
            self.expire(living)

    def find(self, token_hash: str) -> Stored | None:
        """The snapshot of a resume token."""
        for path, _ in self._ours(".json"):
            stored = self._read(path)
            if stored is not None and hmac.compare_digest(
                stored.token_hash.encode(errors="replace"), token_hash.encode()
            ):
                return stored
        return None

    def chunks(self, stored: Stored) -> list[Kept]:
        """Chunks that the client had not presented, in order. Raises UsageError where the snapshot is damaged."""
        path = self._paths(stored.id, stored.index)[1]
        text, arrays = tensorfile.read(path, CHUNKS_FORMAT)
        if text != stored.json():
            raise UsageError(f"{path} is not of the same snapshot as {stored.id}.json, or that was changed")
        indices = sorted(int(name.partition(".")[0]) for name in arrays if name.endswith(".chunk"))
        return [Kept(i, arrays[f"{i}.applied"].tobytes(), arrays[f"{i}.chunk"].tobytes()) for i in indices]

    def delete(self, id: str) -> None:
        """Forget a session."""
        self._unlink(self.folder / f"{id}.json")
        self._drop(id, keep=())

    def expire(self, living: Collection[str]) -> None:
        """Delete snapshots that are too old, then the oldest while all of them take too much.

        Those of `living` sessions stay, and their age begins now. A file that cannot be looked at or deleted is logged
        and passed over.
        """
        now = time.time()
        files: dict[str, list[tuple[Path, int]]] = {}
        ages: dict[str, float] = {}
        for path, id in self._ours():
            try:
                if id in living:
                    os.utime(path)
                status = path.stat()
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("snapshots: %s cannot be looked at: %s", path.name, error)
                continue
            files.setdefault(id, []).append((path, status.st_size))
            ages[id] = min(ages.get(id, now), now - status.st_mtime)
        self.used = sum(size for found in files.values() for _, size in found)
        for id in sorted(files.keys() - set(living), key=lambda id: -ages[id]):
            if ages[id] > self._age or self.full:
                for path, _ in sorted(files[id], key=lambda item: item[0].suffix != ".json"):
                    self._unlink(path)

    def _ours(self, suffix: str = "") -> Iterator[tuple[Path, str]]:
        """Our files: path, and session's id."""
        try:
            paths = list(self.folder.iterdir())
        except OSError as error:
            log.error("snapshots %r cannot be listed: %s", str(self.folder), error)
            return
        for path in paths:
            match = OURS.fullmatch(path.name)
            if match is not None and path.name.endswith(suffix):
                yield path, match[1]

    def _unlink(self, path: Path) -> None:
        try:
            size = _size(path)
            path.unlink(missing_ok=True)
            self.used -= size
        except OSError as error:
            log.warning("snapshots: %s cannot be deleted: %s", path.name, error)

    def _drop(self, id: str, keep: Collection[Path]) -> None:
        for path, of in self._ours():
            if of == id and path not in keep:
                self._unlink(path)

    def _read(self, path: Path) -> Stored | None:
        try:
            if not path.is_file():  # a pipe would stop the thread that reads it
                raise ValueError
            plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if plain.get("format") != FORMAT:
                return None
            plain["prompts"] = [
                (str(i), int(n), str(text), int(heard)) for i, n, text, heard in plain["prompts"]
            ]
            stored = Stored(**plain)
            hints = get_type_hints(Stored)
            if not all(fits(hints[name], value) for name, value in plain.items() if name != "prompts"):
                raise ValueError
            return stored
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.warning("%s is no snapshot and is passed over", path.name)
            return None


def _size(path: Path) -> int:
    """Bytes; 0 where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
