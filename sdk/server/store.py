"""Snapshots of sessions on disk: safetensors for what is large, one JSON file that makes a snapshot valid.

ID.N.session        the runtime's own snapshot after chunk N - 1
ID.N.chunks         chunks that the client had not presented, as they were sent
ID.json             everything else, and N; replaced in one step, last

All other files of the folder are somebody else's and are left alone.
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
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from swiftvideo.runtime.errors import SettingsError, SwiftVideoError

from .session import Kept

log = logging.getLogger(__name__)

FORMAT = 1
OURS = re.compile(r"([0-9a-f]{16})\.(?:json|partial|(\d+)\.(?:session|session\.partial|chunks))")
"""Names of our files: a session's id and, but for its JSON, a chunk's index."""


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
        return str(self.folder / f"{id}.{index}.session")

    def write(self, stored: Stored, kept: list[Kept], living: Collection[str] = ()) -> None:
        """Complete the snapshot whose session file is there, delete the one before, and make room; see `expire`."""
        arrays = {}
        for item in kept:
            arrays[f"{item.index}.applied"] = np.frombuffer(item.applied, np.uint8)
            arrays[f"{item.index}.chunk"] = np.frombuffer(item.chunk, np.uint8)
        chunks = self.folder / f"{stored.id}.{stored.index}.chunks"
        save_file(arrays, chunks)
        partial = self.folder / f"{stored.id}.partial"
        plain = {name: getattr(stored, name) for name in Stored.__slots__}
        partial.write_text(json.dumps(plain), encoding="utf-8")
        document = self.folder / f"{stored.id}.json"
        session = Path(self.session_path(stored.id, stored.index))
        self.used += sum(map(_size, (partial, chunks, session))) - _size(document)
        partial.replace(document)
        self._drop(stored.id, keep=stored.index)
        if self.full:
            self.expire(living)

    def find(self, token_hash: str) -> Stored | None:
        """The snapshot of a resume token."""
        for path, _, _ in self._ours(".json"):
            stored = self._read(path)
            if stored is not None and hmac.compare_digest(stored.token_hash, token_hash):
                return stored
        return None

    def chunks(self, stored: Stored) -> list[Kept]:
        """Chunks that the client had not presented, in order."""
        arrays = load_file(self.folder / f"{stored.id}.{stored.index}.chunks")
        indices = sorted(int(name.partition(".")[0]) for name in arrays if name.endswith(".chunk"))
        return [Kept(i, arrays[f"{i}.applied"].tobytes(), arrays[f"{i}.chunk"].tobytes()) for i in indices]

    def delete(self, id: str) -> None:
        """Forget a session."""
        self._unlink(self.folder / f"{id}.json")
        self._drop(id, keep=None)

    def expire(self, living: Collection[str]) -> None:
        """Delete snapshots that are too old, then the oldest while all of them take too much.

        Those of `living` sessions stay, and their age begins now. A file that cannot be looked at or deleted is logged
        and passed over.
        """
        now = time.time()
        files: dict[str, list[tuple[Path, int]]] = {}
        ages: dict[str, float] = {}
        for path, id, _ in self._ours():
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

    def _ours(self, suffix: str = "") -> Iterator[tuple[Path, str, int | None]]:
        """Our files: path, session's id, and chunk's index."""
        try:
            paths = list(self.folder.iterdir())
        except OSError as error:
            log.error("snapshots %r cannot be listed: %s", str(self.folder), error)
            return
        for path in paths:
            match = OURS.fullmatch(path.name)
            if match is not None and path.name.endswith(suffix):
                yield path, match[1], None if match[2] is None else int(match[2])

    def _unlink(self, path: Path) -> None:
        try:
            size = _size(path)
            path.unlink(missing_ok=True)
            self.used -= size
        except OSError as error:
            log.warning("snapshots: %s cannot be deleted: %s", path.name, error)

    def _drop(self, id: str, keep: int | None) -> None:
        for path, of, index in self._ours():
            if of == id and index is not None and index != keep:
                self._unlink(path)

    def _read(self, path: Path) -> Stored | None:
        try:
            plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if plain.get("format") != FORMAT:
                return None
            plain["prompts"] = [
                (str(i), int(n), str(text), int(heard)) for i, n, text, heard in plain["prompts"]
            ]
            return Stored(**plain)
        except (OSError, ValueError, TypeError, KeyError):
            log.warning("%s is no snapshot and is passed over", path.name)
            return None


def _size(path: Path) -> int:
    """Bytes; 0 where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


LOAD_ERRORS = (OSError, SafetensorError, ValueError, KeyError)
"""What `Store.chunks` raises where files are missing or were changed."""
