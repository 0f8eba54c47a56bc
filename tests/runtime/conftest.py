"""Fixtures of the runtime's tests: one pipeline on one thread, and prompts that its model knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swiftvideo.runtime import Pipeline, load


@pytest.fixture(scope="session")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with load(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def texts() -> tuple[str, str, str]:
    return (
        "a red circle moving right at night",
        "a yellow square moving up in the fog",
        "a blue triangle bouncing at dawn",
    )
