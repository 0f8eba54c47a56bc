"""One exported bundle for all tests of this folder that do not change it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint's bundle. Copy it before changing it."""
    from swiftvideo.export.bundle import export_bundle

    from .small import checkpoint

    folder = tmp_path_factory.mktemp("small") / "bundle"
    export_bundle(checkpoint(), folder)
    return folder
