"""A session's cache rows as numpy arrays, for engines that compute on the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from swiftvideo.runtime.engine import Float32, Float64, Int32
from swiftvideo.runtime.errors import OutOfMemoryError
from swiftvideo.runtime.geometry import Geometry

from .state import Shape, check_state, floats

Array = NDArray[Any]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine, and the control groups of this process, can still give without swapping; None where
    none of them says.

    root: of the file system that says it.
    """
    free = []
    if match := re.search(r"^MemAvailable: +(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE):
        free.append(int(match[1]) * 1024)
    top = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    group = top / own[1] if own else top  # a container sees its own as the top, a unit of systemd does not
    for each in (group, *group.parents):
        limit, used = _text(each / "memory.max").strip(), _text(each / "memory.current").strip()
        if limit.isdigit() and used.isdigit():  # the limit is "max" where there is none
            idle = re.search(r"^inactive_file (\d+)", _text(each / "memory.stat"), re.MULTILINE)
            free.append(max(0, int(limit) - int(used) + (int(idle[1]) if idle else 0)))
        if each == top:
            break
    return min(free, default=None)


def _text(path: Path) -> str:
    """Contents of a small file, empty where there is none."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def zeros(shape: tuple[int, ...], dtype: DTypeLike, what: str) -> Array:
    """An array of zeros, or OutOfMemoryError before the machine starts to swap."""
    size = int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
    free = available_memory()
    try:
        if free is not None and size > free:
            raise MemoryError
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise OutOfMemoryError(
            f"{what} needs {size / 2**20:.0f} MiB and {'too few' if free is None else f'{free / 2**20:.0f} MiB'} "
            "are free: close other sessions, or use a smaller model or resolution"
        ) from error


class HostCache:
    """K and V of all layers, [L,B,R,n,d] each, with rows as `Geometry.rows` has them."""

    def __init__(self, geometry: Geometry, batch: int, dtype: DTypeLike) -> None:
        shape = (geometry.layers, batch, geometry.rows, geometry.heads, geometry.head_dim)
        self.k = zeros((2, *shape), dtype, f"the cache of a session with batch {batch}")
        self.k, self.v = self.k[0], self.k[1]
        self._memory = geometry.memory_rows
        self._sink = slice(self._memory, self._memory + geometry.sink * geometry.frame_tokens)
        self._sink_k: Array | None = None
        """Committed K of the sink, while `k` holds placed ones; never changed, only replaced."""

    def commit(self, ranges: Int32, fresh_k: Array, fresh_v: Array) -> None:
        """Copy rows: ranges [n,3] of (fresh start, row start, length); fresh [L,B,F*P,n,d]."""
        for start, row, length in ranges.tolist():
            self.k[:, :, row : row + length] = fresh_k[:, :, start : start + length]
            self.v[:, :, row : row + length] = fresh_v[:, :, start : start + length]
            if self._sink.start <= row < self._sink.stop:
                self._sink_k = None

    def write_memory(self, row: int, tokens: Float32) -> None:
        """See `EngineSession.write_memory`."""
        rows = slice(row, row + tokens.shape[2])
        self.k[:, :, rows] = tokens
        self.v[:, :, rows] = tokens

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_sink`."""
        if self._sink_k is None:
            self._sink_k = self.k[:, :, self._sink].copy()
        _rotate(self._sink_k, self.k[:, :, self._sink], cos, sin)

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """See `EngineSession.place_memory`."""
        _rotate(self.v[:, :, : self._memory], self.k[:, :, : self._memory], cos, sin)

    def export_state(self) -> dict[str, Array]:
        """All arrays: copies of those that change."""
        both = zeros((2, *self.k.shape), self.k.dtype, "a copy of a session")
        both[0], both[1] = self.k, self.v
        state = {"cache_k": both[0], "cache_v": both[1]}
        if self._sink_k is not None:
            state["sink_k"] = self._sink_k
        return state

    def import_state(self, state: dict[str, Array], others: Mapping[str, Shape]) -> None:
        """Take an `export_state` of the same shapes; nothing changes on error.

        others: what the session has besides, all of which `state` has or none (see `check_state`).
        """
        sink = state.get("sink_k")
        shapes = {"cache_k": self.k.shape, "cache_v": self.v.shape}
        check_state(state, shapes, {"sink_k": self.k[:, :, self._sink].shape}, others)
        self.k[...], self.v[...] = floats(state["cache_k"]), floats(state["cache_v"])
        self._sink_k = None if sink is None else floats(sink).astype(self.k.dtype)


def _rotate(source: Array, target: Array, cos: Float64, sin: Float64) -> None:
    """target's time pairs, the first of each head = source's, rotated in float64: [L,...,d], layer by layer."""
    width = 2 * len(cos)
    for old, new in zip(source, target, strict=True):
        even = old[..., 0:width:2].astype(np.float64)
        odd = old[..., 1:width:2].astype(np.float64)
        new[..., 0:width:2] = even * cos - odd * sin
        new[..., 1:width:2] = even * sin + odd * cos
