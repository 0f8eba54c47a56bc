"""Snapshots of sessions on disk: safetensors for what is large, one JSON file that makes a snapshot valid.

ID.N.session        the runtime's own snapshot after chunk N - 1
ID.N.chunks         chunks that the client had not presented, as they were sent
ID.json             everything else, and N; replaced in one step, last
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .session import Kept

log = logging.getLogger(__name__)

FORMAT = 1


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
    """

    def __init__(self, folder: Path, age: float) -> None:
        self.folder = folder
        self._age = age
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)

    def session_path(self, id: str, index: int) -> str:
        """Where the runtime writes."""
        return str(self.folder / f"{id}.{index}.session")

    def write(self, stored: Stored, kept: list[Kept]) -> None:
        """Complete the snapshot whose session file is there, and delete the one before."""
        arrays = {}
        for item in kept:
            arrays[f"{item.index}.applied"] = np.frombuffer(item.applied, np.uint8)
            arrays[f"{item.index}.chunk"] = np.frombuffer(item.chunk, np.uint8)
        save_file(arrays, self.folder / f"{stored.id}.{stored.index}.chunks")
        partial = self.folder / f"{stored.id}.partial"
        plain = {name: getattr(stored, name) for name in Stored.__slots__}
        partial.write_text(json.dumps(plain), encoding="utf-8")
        partial.replace(self.folder / f"{stored.id}.json")
        self._drop(stored.id, keep=stored.index)

    def find(self, token_hash: str) -> Stored | None:
        """The snapshot of a resume token."""
        for path in self.folder.glob("*.json"):
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
        (self.folder / f"{id}.json").unlink(missing_ok=True)
        self._drop(id, keep=None)

    def expire(self) -> None:
        """Delete what is too old, and remains of snapshots that were never completed."""
        now = time.time()
        for path in self.folder.iterdir():
            try:
                old = now - path.stat().st_mtime > self._age
            except FileNotFoundError:
                continue
            if old and path.suffix in (".json", ".partial", ".session", ".chunks"):
                path.unlink(missing_ok=True)

    def _drop(self, id: str, keep: int | None) -> None:
        for path in self.folder.glob(f"{id}.*"):
            number = path.name.split(".")[1]
            if number.isdigit() and int(number) != keep:
                path.unlink(missing_ok=True)

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


LOAD_ERRORS = (OSError, SafetensorError, ValueError, KeyError)
"""What `Store.chunks` raises where files are missing or were changed."""
