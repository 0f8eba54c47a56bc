"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swiftvideo.runtime.pipeline import EMBEDDED

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import ONNX Runtime themselves


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle that runs in milliseconds a chunk: the embedded model, else one with random weights."""
    if (EMBEDDED / "manifest.json").is_file():
        return EMBEDDED
    pytest.importorskip("torch")
    from swiftvideo.export.bundle import export_bundle
    from swiftvideo.export.checkpoint import load_checkpoint
    from tests.bench.naive import untrained_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    export_bundle(load_checkpoint(untrained_checkpoint(folder / "checkpoint")), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of tests/export/small.py. Copy it before changing it."""
    pytest.importorskip("torch")
    from tests.export.small import export_small

    return export_small(tmp_path_factory.mktemp("small") / "bundle")
