"""Bundles to build plans for. Building needs TensorRT-RTX, which CI installs, and no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swiftvideo.runtime.plugins.flavours import RTX


@pytest.fixture(scope="session")
def rtx() -> None:
    """Skip where TensorRT-RTX or Triton is not installed."""
    pytest.importorskip("triton", reason="kernels need triton: pip install 'swiftvideo[export]'")
    if RTX.installed is None:
        pytest.skip(f"TensorRT-RTX is not installed: {RTX.install}")


@pytest.fixture(scope="session")
def exported(rtx: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle, without plans."""
    from .bundles import export_small

    return export_small(tmp_path_factory.mktemp("exported") / "bundle")


@pytest.fixture
def small(exported: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))
