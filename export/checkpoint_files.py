"""Reads weight files: safetensors, sharded safetensors with an index, torch files without code."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from swiftvideo.runtime.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")
"""What diffusers, transformers and peft call their files of weights."""

_GLOBAL = re.compile(r"GLOBAL (\S+)")


def find_weights(path: Path) -> list[Path]:
    """Files that hold the weights at `path`: a file itself, or what a folder holds (index first, then its shards).

    Of several in a folder, such as an fp16 variant beside the others, the one with a library's own name counts.
    Raises CheckpointError where there is nothing, or more than one set of weights.
    """
    if path.is_file():
        return [path, *_shards(path)] if path.name.endswith(INDEX_SUFFIX) else [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder or a file with weights")
    own = [
        path / (stem + suffix) for stem in STEMS for suffix in (".safetensors" + INDEX_SUFFIX, ".safetensors")
    ]
    indices = sorted(path.glob("*" + INDEX_SUFFIX))
    singles = sorted(path.glob("*.safetensors"))
    candidates = [file for file in own if file.is_file()][:1] or indices or singles
    candidates = candidates or sorted(f for f in path.iterdir() if f.suffix in TORCH_SUFFIXES)
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
    file = find_weights(path)[0]
    if file.name.endswith(INDEX_SUFFIX):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{file}: the kind {file.suffix!r} is unknown; use .safetensors or {', '.join(TORCH_SUFFIXES)}"
        )
    _refuse_substitutes(file)
    try:
        archive = zipfile.is_zipfile(file)
        if archive:
            _refuse_program(file)
        # Mapped, so that containers that are not wanted cost no memory.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        what = f"would run code when read: it names {named[1]}" if named else "is not plain tensors"
        raise CheckpointError(f"{file} {what}; convert it to safetensors where you trust it") from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise _damaged(file, error) from error


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for other kinds."""
    if file.suffix != ".safetensors":
        return {}
    with _opened(file) as content:
        return dict(content.metadata() or {})


def stored_shapes(files: Iterable[Path]) -> dict[str, torch.Size]:
    """Shapes of the tensors in safetensors files, by their headers alone; other files are passed over.

    Raises CheckpointError where a file is damaged or holds quantised weights.
    """
    shapes: dict[str, torch.Size] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with _opened(file) as content:
                found = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
                check_floating({name: tensor.get_dtype() for name, tensor in found.items()}, file)
                shapes |= {name: torch.Size(tensor.get_shape()) for name, tensor in found.items()}
    return shapes


def check_floating(kinds: Mapping[str, torch.dtype | str], source: object) -> None:
    """Raise CheckpointError unless all dtypes, torch's or safetensors', are of floating point."""
    for name, kind in kinds.items():
        if not (kind.is_floating_point if isinstance(kind, torch.dtype) else "F" in kind):
            raise CheckpointError(
                f"{source}: {name} is {kind}, and quantised weights are not supported; use the fp32 or bf16 file"
            )


def check_dense(state: Mapping[str, torch.Tensor], source: object) -> None:
    """Raise CheckpointError where a tensor is sparse, or on the meta device and so without values."""
    for name, value in state.items():
        kind = "meta, without values" if value.is_meta else str(value.layout)
        if value.is_meta or value.layout != torch.strided:
            raise CheckpointError(
                f"{source}: {name} is {kind}; save dense tensors, each `tensor.to_dense().cpu()`"
            )


def check_finite(state: Mapping[str, torch.Tensor], source: object) -> None:
    """Raise CheckpointError where a tensor holds NaN or infinity."""
    for name, value in state.items():
        if not value.numel():
            continue
        low, high = (value.float() if value.element_size() == 1 else value).aminmax()
        if not (low.isfinite() and high.isfinite()):
            remedy = "use bf16 or fp32, or " if value.dtype == torch.float16 else ""
            raise CheckpointError(
                f"{source}: {name} has values that are not finite in {value.dtype}; {remedy}copy the file again"
            )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    _refuse_substitutes(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: of torch, for sizes beyond 64 bits
        raise _damaged(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _refuse_substitutes(path)
    try:
        with safe_open(path, "pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0]
    return CheckpointError(f"{path} cannot be read; it may be cut short, copy it again: {reason}")


def _refuse_substitutes(path: Path) -> None:
    """Raise CheckpointError for what downloads leave in the place of weights."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise _damaged(path, error) from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is a web page, not the weights; download the file itself")


def _refuse_program(archive: Path) -> None:
    """Raise CheckpointError for a TorchScript archive, which torch.load would hand to torch.jit.load, and for a
    compressed one: torch writes none, and what a few megabytes unfold to may fill the memory."""
    with zipfile.ZipFile(archive) as members:
        names = members.namelist()
        packed = [item.filename for item in members.infolist() if item.compress_type != zipfile.ZIP_STORED]
    if any(Path(name).name == "constants.pkl" for name in names):
        raise CheckpointError(
            f"{archive} is a TorchScript program; open it with torch.jit.load where you trust it, and save its "
            "state_dict()"
        )
    if packed:
        raise CheckpointError(
            f"{archive} holds {packed[0]} compressed, which torch.save does not do; save it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is missing or something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; copy it again") from error
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
    shards = [index.parent / name for name in sorted(set(_weight_map(index).values()))]
    for path in shards:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {index.name} lists it; download the shard")
    return shards


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    listed = _weight_map(index)
    state: dict[str, torch.Tensor] = {}
    for path in _shards(index):
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
