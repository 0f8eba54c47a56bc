"""Fixtures of the service's tests: a small bundle with real graphs, and a server on it in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .harness import ServerProcess, embedded, export_small

pytest.importorskip("grpc")


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that makes a chunk in milliseconds. SWIFTVIDEO_SMALL_BUNDLE names one that was made before."""
    made = os.environ.get("SWIFTVIDEO_SMALL_BUNDLE")
    if made:
        return Path(made)
    pytest.importorskip("torch")
    return export_small(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="session")
def pipeline(small_bundle: Path) -> Iterator[Any]:
    """The same model in this process."""
    with embedded(small_bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(small_bundle: Path) -> Iterator[ServerProcess]:
    """A server without limits of load, shared by a module's tests."""
    with ServerProcess(small_bundle, "--max-load", "0", "--max-sessions", "32", "--reflection") as running:
        yield running
        assert running.process.poll() is None, "\n".join(running.log[-20:])
