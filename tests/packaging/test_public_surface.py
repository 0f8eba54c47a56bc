"""The names that users may rely on. A change here is a change of the API: say so in CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
from typing import Literal, get_type_hints

import pytest

from swiftvideo import runtime
from swiftvideo.runtime import _core, errors
from swiftvideo.runtime.geometry import Mode, Policy

RUNTIME = [
    "AnchorSettings", "BridgeSettings", "BundleError", "BundleIntegrityError", "BundleMissingError",
    "BundleVersionError", "Chunk", "ClosedError", "Engine", "EngineError", "EngineSession", "EngineUnavailableError",
    "Geometry", "IntegrityError", "Manifest", "OutOfMemoryError", "Pipeline", "PolicySettings", "Prompt", "PromptError",
    "Session", "SettingsError", "Snapshot", "StoppedError", "SwiftVideoError", "UsageError", "WindowSettings", "load",
]  # fmt: skip


def test_the_runtimes_names() -> None:
    assert sorted(runtime.__all__) == RUNTIME
    assert set(RUNTIME) <= set(dir(runtime))


@pytest.mark.parametrize("name", RUNTIME)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(runtime, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not method.startswith("_") and function.__module__.startswith("swiftvideo"):
                assert inspect.getdoc(function), f"{name}.{method} has no docstring"


def test_names_of_modes_policies_and_engines_are_types() -> None:
    """So a type checker sees a misspelt one."""
    assert get_type_hints(runtime.Chunk)["mode"] == Mode | Literal[""]
    assert get_type_hints(runtime.Pipeline.session)["policy"] == runtime.PolicySettings | Policy | None
    assert get_type_hints(runtime.load)["engine"] == Literal["auto", "onnxruntime", "tensorrt"]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = runtime.nonsense


def test_every_exception_has_one_root() -> None:
    found = [
        value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)
    ]
    assert len(found) > 10
    assert all(issubclass(value, errors.SwiftVideoError) for value in found)


def test_the_cores_names() -> None:
    assert [name for name in dir(_core) if not name.startswith("_")] == ["Cache"]
    for name in dir(_core.Cache):
        assert name.startswith("_") or inspect.getdoc(getattr(_core.Cache, name)), (
            f"Cache.{name} has no docstring"
        )


def test_swiftvideo_is_a_namespace() -> None:
    assert getattr(importlib.import_module("swiftvideo"), "__file__", None) is None
