"""Saved arrays of a session, looked at before an engine takes any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.errors import UsageError

Shape = tuple[int, ...]


def check_state(
    state: Mapping[str, NDArray[Any]], shapes: Mapping[str, Shape], *optional: Mapping[str, Shape]
) -> None:
    """Raise UsageError unless `state` has arrays of these names and shapes and no others, in float32 or float16.

    optional: more of them, each group of which is there as a whole or not at all. Engines give out a bundle's numbers
    in either dtype, both of which hold them exactly.
    """
    wanted = dict(shapes)
    for group in optional:
        if state.keys() & group.keys():
            wanted |= group
    for name in sorted(state.keys() | wanted.keys()):
        value, shape = state.get(name), wanted.get(name)
        if value is None or value.shape != shape or value.dtype not in (np.float32, np.float16):
            seen = "missing" if value is None else f"{value.dtype} {value.shape}"
            raise UsageError(
                f"{name} of the saved state is {seen}, this session has {shape or 'none'} in float32 or float16: "
                "restore it with the bundle that it was saved from"
            )
