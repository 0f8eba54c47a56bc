"""Reads weight files: safetensors, sharded safetensors with an index, torch files without code."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from swiftvideo.runtime.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"


def find_weights(path: Path) -> list[Path]:
    """Files that hold the weights at `path`: a file itself, or what a folder holds (index first, then its shards).

    Raises CheckpointError where there is nothing, or more than one set of weights.
    """
    if path.is_file():
        return [path, *_shards(path)] if path.name.endswith(INDEX_SUFFIX) else [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder or a file with weights")
    indices = sorted(path.glob("*" + INDEX_SUFFIX))
    singles = sorted(path.glob("*.safetensors"))
    candidates = indices or singles or sorted(f for f in path.iterdir() if f.suffix in TORCH_SUFFIXES)
    if len(candidates) != 1:
        found = ", ".join(f.name for f in candidates[:5]) or "none"
        raise CheckpointError(
            f"{path} must hold one weights file or one {INDEX_SUFFIX}, but holds {found}; name the file itself"
        )
    return find_weights(candidates[0])


def read_weights(path: Path) -> Any:
    """Content of the weights at `path` (see `find_weights`): named tensors, or the containers of a torch file.

    Torch files are read with weights_only=True: a file that would run code is refused.
    """
    files = find_weights(path)
    if files[0].name.endswith(INDEX_SUFFIX):
        return _read_shards(files[0])
    if files[0].suffix == ".safetensors":
        return _read_safetensors(files[0])
    if files[0].suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{files[0]}: the kind {files[0].suffix!r} is unknown; use .safetensors or {', '.join(TORCH_SUFFIXES)}"
        )
    try:
        # Mapped, so that containers that are not wanted cost no memory.
        return torch.load(files[0], map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(files[0]))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{files[0]} is not plain tensors, or would run code when read; convert it to safetensors: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{files[0]} cannot be read; it may be cut short, copy it again: {error}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read; it may be cut short, copy it again: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is missing or something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and should hold an object")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map; use the index that belongs to the shards")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names the shard {name!r}; a .safetensors file beside it is needed"
            )
    return names


def _shards(index: Path) -> list[Path]:
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    listed = _weight_map(index)
    state: dict[str, torch.Tensor] = {}
    for path in _shards(index):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {index.name} lists it; download the shard")
        shard = _read_safetensors(path)
        stray = [key for key in shard if listed.get(key) != path.name]
        if stray:
            raise CheckpointError(f"{path} holds {stray[0]}, which {index.name} does not place there")
        state.update(shard)
    absent = [key for key in listed if key not in state]
    if absent:
        raise CheckpointError(f"{index}: {len(absent)} listed weights are in no shard, first {absent[0]}")
    return state


def digest(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over the names below `root` and the contents of files, lower-case hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(set(files)):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()
