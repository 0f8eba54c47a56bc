"""A session at one moment, and in a file: its arrays, and the rest as JSON (see tensorfile.py).

A restored session continues byte for byte, on the same engine, kind of processor and number of threads; with others,
a frame's values may differ by one. Prompts are saved as text and encoded again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import tensorfile
from .engine import Prompt
from .errors import BundleError, SwiftVideoError, UsageError
from .files import target
from .geometry import PolicySettings
from .manifest import settings_from
from .noise import checked_seed
from .rollout import FRAMES, Pending, Rollout

FORMAT = "swiftvideo-session-2"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Snapshot:
    """All of a session between two chunks, in host memory. Made by `Session.snapshot`; nothing changes it any more."""

    model: str
    """`Manifest.fingerprint` of the bundle."""
    seed: int
    settings: PolicySettings
    prompt: str
    """The running one."""
    number: int
    """Of the running prompt."""
    asked: int
    """Prompts so far, the first included."""
    index: int
    """Chunks made."""
    segment: int
    pending: list[tuple[int, int, str]]
    """Frame, number and text of each prompt that waits."""
    memory: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, and of a file but for a few kilobytes."""
        return sum(value.nbytes for value in self.arrays.values())

    def save(self, path: str | Path) -> None:
        """Write a file that `Pipeline.restore` takes; see `Session.save`. Any thread may, also once the session is
        closed: others go on meanwhile.

        Raises UsageError where the file cannot be written, or where `path` is a folder, a pipe or a device.
        """
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"path is {path!r}: the name of a file is needed")
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        arrays = plain.pop("arrays")
        plain["settings"] = dataclasses.asdict(self.settings)
        try:
            tensorfile.write(target(path), FORMAT, json.dumps(plain), arrays)
        except UsageError:
            raise
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be written ({error}): choose another place") from error


def take(rollout: Rollout, seed: int, settings: PolicySettings, model: str) -> Snapshot:
    """What a rollout is between two chunks.

    Raises UsageError where a prompt has no text: it was made from embeddings and could not be encoded again.
    """
    asked, pending = rollout.waiting()
    for prompt in (rollout.prompt, *(item.prompt for item in pending)):
        if not prompt.text:
            raise UsageError(
                "a prompt of this session was made from embeddings: only prompts with a text can be saved"
            )
    memory, arrays = rollout.memory.export_state()
    tensors = {f"memory/{name}": value for name, value in arrays.items()}
    tensors |= {f"engine/{name}": value for name, value in rollout.tensors.export_state().items()}
    tensors["emitted"] = rollout.emitted
    return Snapshot(
        model=model,
        seed=seed,
        settings=settings,
        prompt=rollout.prompt.text,
        number=rollout.number,
        asked=asked,
        index=rollout.index,
        segment=rollout.segment,
        pending=[(item.frame, item.number, item.prompt.text) for item in pending],
        memory=memory,
        arrays=tensors,
    )


def read(path: str | Path) -> Snapshot:
    """What `Snapshot.save` wrote. Raises UsageError where the file is no saved session."""
    text, arrays = tensorfile.read(path, FORMAT)
    try:
        plain: dict[str, Any] = json.loads(text)
        plain["settings"] = settings_from(plain["settings"], f"{path}: settings")
        plain["pending"] = [
            (index(frame), index(number), str(text)) for frame, number, text in plain["pending"]
        ]
        for name in ("number", "asked", "index", "segment"):
            plain[name] = index(plain[name])
        plain["seed"] = checked_seed(plain["seed"])
        saved = Snapshot(**plain, arrays=arrays)
        counts = saved.number, saved.asked, saved.index, saved.segment
        if min(counts) < 0 or max(counts) >= FRAMES or saved.number >= saved.asked:
            raise ValueError(f"number, asked, index and segment are {counts}")
        for frame, number, _ in saved.pending:
            if not 0 <= frame < FRAMES or not 0 < number < saved.asked:
                raise ValueError(f"prompt {number} of {saved.asked} waits for frame {frame}")
        return saved
    except (BundleError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is no saved session ({error}): save it again") from error


def put(rollout: Rollout, saved: Snapshot, encode: Callable[[str | Prompt], Prompt]) -> None:
    """Bring a new rollout of the same model and settings into the saved state.

    Raises UsageError, PromptError or IntegrityError where it does not fit; the rollout is of no use then.
    """
    parts: dict[str, dict[str, NDArray[Any]]] = {"memory": {}, "engine": {}}
    rest: dict[str, NDArray[Any]] = {}
    for name, value in saved.arrays.items():
        part, _, inner = name.partition("/")
        parts.get(part, rest)[inner or name] = value
    try:
        emitted = rest["emitted"]
        kept = min(saved.index * rollout.geometry.chunk, rollout.geometry.window)
        like = (*rollout.emitted.shape[:1], kept, *rollout.emitted.shape[2:])
        if emitted.shape != like or emitted.dtype != np.float32:
            raise UsageError(f"emitted is {emitted.dtype} {emitted.shape}, not float32 {like}")
        rollout.tensors.import_state(parts["engine"])
        rollout.memory.import_state(saved.memory, parts["memory"], len(rollout.emitted))
        rollout.prompt, rollout.number, rollout.asked = encode(saved.prompt), saved.number, saved.asked
        rollout.index, rollout.segment, rollout.emitted = saved.index, saved.segment, emitted
        rollout.pending = [Pending(frame, number, encode(text)) for frame, number, text in saved.pending]
        if rollout.frame * rollout.geometry.frame_tokens != rollout.memory.cache.global_end:
            raise UsageError(f"the cache ends elsewhere than chunk {saved.index} begins")
    except SwiftVideoError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"the saved session does not fit together ({error}): save it again") from error
