"""A session in a file: safetensors arrays with the rest as JSON in their header. Never pickle.

A restored session continues byte for byte. Prompts are saved as text and encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .engine import Prompt
from .errors import UsageError
from .rollout import Pending, Rollout

FORMAT = "swiftvideo-session-1"


def save(path: str | Path, rollout: Rollout, extra: dict[str, Any]) -> None:
    """Write a rollout and `extra`, plain values that `read` gives back.

    Raises UsageError where a prompt has no text: it was made from embeddings and could not be encoded again.
    """
    waiting = [(item.frame, item.number, item.prompt.text) for item in rollout.pending]
    for text in (rollout.prompt.text, *(text for _, _, text in waiting)):
        if not text:
            raise UsageError(
                "a prompt of this session was made from embeddings: only prompts with a text can be saved"
            )
    memory, arrays = rollout.memory.export_state()
    plain = {
        **extra,
        "prompt": rollout.prompt.text,
        "number": rollout.number,
        "asked": rollout.asked,
        "index": rollout.index,
        "segment": rollout.segment,
        "pending": waiting,
        "memory": memory,
    }
    tensors = {f"memory/{name}": value for name, value in arrays.items()}
    tensors |= {f"engine/{name}": value for name, value in rollout.tensors.export_state().items()}
    tensors["emitted"] = rollout.emitted
    partial = Path(f"{path}.partial")
    packed = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(packed, partial, {"format": FORMAT, "session": json.dumps(plain)})
    partial.replace(path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Plain values and arrays of a file that `save` wrote. Raises UsageError where it is none."""
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UsageError(
                    f"{path} has format {header.get('format')!r}, not {FORMAT!r}: it is no saved session"
                )
            plain: dict[str, Any] = json.loads(header["session"])
            return plain, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UsageError(f"{path} is not there: save a session to it first") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is no saved session ({error}): save it again") from error


def put(
    rollout: Rollout,
    plain: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    encode: Callable[[str | Prompt], Prompt],
) -> None:
    """Bring a new rollout of the same model and settings into the saved state."""
    parts: dict[str, dict[str, NDArray[Any]]] = {"memory": {}, "engine": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition("/")
        if rest:
            parts[part][rest] = value
    rollout.tensors.import_state(parts["engine"])
    rollout.memory.import_state(plain["memory"], parts["memory"])
    rollout.prompt, rollout.number, rollout.asked = encode(plain["prompt"]), plain["number"], plain["asked"]
    rollout.index, rollout.segment, rollout.emitted = plain["index"], plain["segment"], arrays["emitted"]
    rollout.pending = [Pending(frame, number, encode(text)) for frame, number, text in plain["pending"]]
