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
    from .engine import Engine as Engine
    from .engine import EngineSession as EngineSession
    from .engine import Prompt as Prompt
    from .errors import (
        BundleError as BundleError,
    )
    from .errors import (
        BundleIntegrityError as BundleIntegrityError,
    )
    from .errors import (
        BundleMissingError as BundleMissingError,
    )
    from .errors import (
        BundleVersionError as BundleVersionError,
    )
    from .errors import (
        ClosedError as ClosedError,
    )
    from .errors import (
        EngineError as EngineError,
    )
    from .errors import (
        EngineUnavailableError as EngineUnavailableError,
    )
    from .errors import (
        IntegrityError as IntegrityError,
    )
    from .errors import (
        OutOfMemoryError as OutOfMemoryError,
    )
    from .errors import (
        PromptError as PromptError,
    )
    from .errors import (
        SettingsError as SettingsError,
    )
    from .errors import (
        SwiftVideoError as SwiftVideoError,
    )
    from .errors import (
        UsageError as UsageError,
    )
    from .geometry import AnchorSettings as AnchorSettings
    from .geometry import BridgeSettings as BridgeSettings
    from .geometry import Geometry as Geometry
    from .geometry import PolicySettings as PolicySettings
    from .geometry import WindowSettings as WindowSettings
    from .manifest import Manifest as Manifest
    from .pipeline import Pipeline as Pipeline
    from .pipeline import load as load
    from .session import Chunk as Chunk
    from .session import Session as Session

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
        "SwiftVideoError",
        "UsageError",
    ),
    "geometry": ("AnchorSettings", "BridgeSettings", "Geometry", "PolicySettings", "WindowSettings"),
    "manifest": ("Manifest",),
    "pipeline": ("Pipeline", "load"),
    "session": ("Chunk", "Session"),
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
