"""Fixtures that more than one folder of tests uses, tests in several processes, and what is said at the end."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime.pipeline import EMBEDDED

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import ONNX Runtime themselves
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores are other workers'

GOLDEN_LATENTS = "golden_latents"
"""Property of a test's report: engine, scenario, largest error of its latents."""


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

    return made_once(tmp_path_factory, "small", export_small)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of the run's processes makes, and the others wait for."""
    from filelock import FileLock

    own = factory.getbasetemp()
    base = (own.parent if WORKER else own) / name
    base.mkdir(exist_ok=True)
    with FileLock(base / "lock"):
        if not (base / "made").exists():
            shutil.rmtree(base / "bundle", ignore_errors=True)  # of a process that failed
            make(base / "bundle")
            (base / "made").touch()
    return base / "bundle"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How far each engine was from the recorded latents, at most."""
    errors: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == GOLDEN_LATENTS:
                errors[value[0]].append((value[2], value[1]))
    for engine, found in errors.items():
        error, scenario = max(found)
        terminalreporter.write_line(
            f"recorded latents, {engine}: largest error {error:.2g}, in {scenario} of {len(found)} scenarios"
        )
