"""Saved arrays of a session, looked at before an engine takes any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.errors import UsageError

Array = NDArray[Any]
Shape = tuple[int, ...]

DTYPES = (np.float32, np.float16, np.uint16)
"""Of a state's arrays; uint16 are the bits of bfloat16."""


def check_state(
    state: Mapping[str, Array], shapes: Mapping[str, Shape], *optional: Mapping[str, Shape]
) -> None:
    """Raise UsageError unless `state` has arrays of these names and shapes and no others, in `DTYPES`.

    optional: more of them, each group of which is there as a whole or not at all. Engines give out a bundle's numbers
    as they keep them, in one dtype or another that holds them exactly.
    """
    wanted = dict(shapes)
    for group in optional:
        if state.keys() & group.keys():
            wanted |= group
    for name in sorted(state.keys() | wanted.keys()):
        value, shape = state.get(name), wanted.get(name)
        if value is None or value.shape != shape or value.dtype not in DTYPES:
            seen = "missing" if value is None else f"{value.dtype} {value.shape}"
            raise UsageError(
                f"{name} of the saved state is {seen}, this session has {shape or 'none'} in float32, float16 or "
                "bfloat16: restore it with the bundle that it was saved from"
            )


def widened(bits: Array) -> Array:
    """float32 of bfloat16, which come as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def floats(value: Array) -> Array:
    """An array of a state as numpy computes with it."""
    return widened(value) if value.dtype == np.uint16 else value
