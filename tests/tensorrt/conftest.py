"""Bundles to build plans for. Building needs TensorRT-RTX, which CI installs, and no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swiftvideo.runtime.plugins.flavours import RTX
from tests.conftest import made_once


@pytest.fixture(scope="session")
def rtx() -> None:
    """Skip where TensorRT-RTX or Triton is not installed."""
    pytest.importorskip("triton", reason="kernels need triton: pip install 'swiftvideo[export]'")
    if RTX.installed is None:
        pytest.skip(f"TensorRT-RTX is not installed: {RTX.install}")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle, without plans."""
    pytest.importorskip("torch", reason="exporting needs torch: pip install 'swiftvideo[export]'")
    from .bundles import export_small

    return made_once(tmp_path_factory, "exported", export_small)


@pytest.fixture
def small(rtx: None, exported: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle, to build plans for."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))
