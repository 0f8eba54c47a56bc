"""Arrays and a text in a safetensors file with a checksum. Never pickle.

The metadata of the file hold the name of its format, the text, and the SHA-256 of both and of every array. The hash
reads the arrays where they lie, at 1.1 GB/s on an EPYC with SHA extensions (BLAKE2b: 0.6 GB/s): 5 s for the 5.3 GB of a
session of a 1.3B model at full size.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .engines.host import available_memory
from .errors import OutOfMemoryError, UsageError
from .files import replace

Array = NDArray[Any]


def write(path: Path, format: str, text: str, arrays: Mapping[str, Array]) -> None:
    """Write a file that `read` takes, in place of one of that name (see `files.replace`).

    arrays: of floats or integers. Raises OSError or ValueError.
    """
    packed = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    metadata = {"format": format, "text": text, "sha256": _checksum(format, text, packed)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    order = sorted(packed, key=lambda name: (-packed[name].itemsize, name))  # so that every array is aligned
    for name in order:
        value, begin = packed[name], end
        end += value.nbytes
        dtype = f"{value.dtype.kind.upper()}{8 * value.itemsize}"  # such as F32
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    replace(path, [len(encoded).to_bytes(8, "little"), encoded, *(_bytes(packed[name]) for name in order)])


def read(path: str | Path, format: str) -> tuple[str, dict[str, Array]]:
    """Text and arrays that `write` wrote, once their checksum was found right. Raises UsageError, OutOfMemoryError."""
    try:
        status, free = Path(path).stat(), available_memory()
        if not stat.S_ISREG(status.st_mode):  # a pipe has no end
            raise ValueError("it is no file")
        size = status.st_size
        if free is not None and size > free:  # a file that is all holes takes no disk
            raise OutOfMemoryError(
                f"{path} has {size / 2**20:.0f} MiB and {free / 2**20:.0f} MiB of memory are free: close other sessions"
            )
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != format:
                raise UsageError(
                    f"{path} has format {found!r}, not {format!r}: it is something else, or of another version; "
                    "save it again"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["text"]
        right = _checksum(format, text, arrays) == metadata["sha256"]
    except FileNotFoundError as error:
        raise UsageError(f"{path} is not there: save it first") from error
    except (UsageError, OutOfMemoryError):
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        # AttributeError: of the library, where numpy lacks the dtype.
        raise UsageError(f"{path} is not what was saved ({error}): save it again") from error
    if not right:
        raise UsageError(f"{path} is not what was saved (its SHA-256 is another): save it again")
    return text, arrays


def _checksum(format: str, text: str, arrays: Mapping[str, Array]) -> str:
    names = sorted(arrays)
    table = [(name, arrays[name].dtype.str, arrays[name].shape) for name in names]
    digest = hashlib.sha256(json.dumps([format, text, table]).encode())
    for name in names:
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def _bytes(array: Array) -> memoryview:
    """Those of a contiguous array, where they lie."""
    return array.reshape(-1).view(np.uint8).data
