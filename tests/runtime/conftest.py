"""Fixtures of the runtime's tests: one pipeline on one thread, prompts that its model knows, and a video of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swiftvideo.runtime import Pipeline, Session, load


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


@pytest.fixture
def session(pipeline: Pipeline, texts: tuple[str, ...]) -> Iterator[Session]:
    with pipeline.session(texts[0], 7) as opened:
        yield opened
