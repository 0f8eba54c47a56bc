"""Which engine a command runs on. The runtime knows those that need no torch; `torch` comes from swiftvideo.export."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from swiftvideo.runtime import Pipeline, load
from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.pipeline import EngineName

from .parts import needing

TORCH = {"torch": None, "torch:cpu": "cpu", "torch:cuda": "cuda"}
"""Devices by engine name; None: the GPU that torch sees, else the CPU."""
ENGINES = ("auto", "onnxruntime", "tensorrt", *TORCH)


def open_pipeline(bundle: Path | None = None, engine: str = "auto", threads: int | None = None) -> Pipeline:
    """A bundle, or the embedded model, on the engine of `--engine`.

    Raises:
        SettingsError: no such engine.
        MissingPartError: the torch engine was asked for and torch is not installed.
        BundleError, EngineUnavailableError: see `swiftvideo.runtime.load` and `swiftvideo.export.restore.open_torch`.
    """
    if engine not in ENGINES:
        raise SettingsError(f"engine is {engine!r}: use {', '.join(map(repr, ENGINES))}")
    if engine not in TORCH:
        return load(bundle, cast(EngineName, engine), threads)
    with needing("export", f"engine {engine!r}"):
        from swiftvideo.export.restore import open_torch

        return open_torch(bundle, TORCH[engine], threads)
