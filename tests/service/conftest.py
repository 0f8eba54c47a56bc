"""Fixtures of the service's tests: the small bundle in this process, and a server on it in one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .harness import ServerProcess, embedded

pytest.importorskip("grpc")


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
