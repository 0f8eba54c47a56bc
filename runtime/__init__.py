"""Opens bundles and makes endless video from prompts that may change while it plays.

    from swiftvideo.runtime import load

    pipeline = load()                                  # the embedded model; or a bundle's path
    with pipeline.session(prompt="...", seed=7) as session:
        for chunk in session:                          # chunk.frames: uint8 [n,H,W,3]
            session.prompt("...")                      # takes effect at the next chunk boundary

Names are imported when they are first used, so `import swiftvideo.runtime` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine as Engine, EngineSession as EngineSession, Prompt as Prompt
    from .errors import (
        BundleError as BundleError,
        BundleIntegrityError as BundleIntegrityError,
        BundleMissingError as BundleMissingError,
        BundleVersionError as BundleVersionError,
        ClosedError as ClosedError,
        EngineError as EngineError,
        EngineUnavailableError as EngineUnavailableError,
        IntegrityError as IntegrityError,
        OutOfMemoryError as OutOfMemoryError,
        PromptError as PromptError,
        SettingsError as SettingsError,
        StoppedError as StoppedError,
        SwiftVideoError as SwiftVideoError,
        UsageError as UsageError,
    )
    from .geometry import (
        AnchorSettings as AnchorSettings,
        BridgeSettings as BridgeSettings,
        Geometry as Geometry,
        PolicySettings as PolicySettings,
        WindowSettings as WindowSettings,
    )
    from .manifest import Manifest as Manifest
    from .pipeline import Pipeline as Pipeline, load as load
    from .session import Chunk as Chunk, Session as Session
    from .snapshot import Snapshot as Snapshot

_HOMES = {
    "engine": ("Engine", "EngineSession", "Prompt"),
    "errors": (
        "BundleError",
        "BundleIntegrityError",
        "BundleMissingError",
        "BundleVersionError",
        "ClosedError",
        "EngineError",
        "EngineUnavailableError",
        "IntegrityError",
        "OutOfMemoryError",
        "PromptError",
        "SettingsError",
        "StoppedError",
        "SwiftVideoError",
        "UsageError",
    ),
    "geometry": ("AnchorSettings", "BridgeSettings", "Geometry", "PolicySettings", "WindowSettings"),
    "manifest": ("Manifest",),
    "pipeline": ("Pipeline", "load"),
    "session": ("Chunk", "Session"),
    "snapshot": ("Snapshot",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
