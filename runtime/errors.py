"""The exception tree of swiftvideo.

    SwiftVideoError
    ├── UsageError            the caller asked for something that cannot be done (also a ValueError)
    │   ├── PromptError       empty, too long, or with words the tokenizer does not know
    │   ├── SettingsError     a policy, geometry or export setting is out of range
    │   └── ClosedError       the session or pipeline was closed
    ├── StoppedError          a chunk was given up because the session's interrupt asked for it
    ├── BundleError           a bundle cannot be used
    │   ├── BundleMissingError    a file or folder is not there
    │   ├── BundleVersionError    written by an incompatible version
    │   └── BundleIntegrityError  a file's bytes are not those the manifest lists
    ├── CheckpointError       a checkpoint's names or shapes do not fit (export)
    ├── EngineError           the engine failed while running
    │   ├── EngineUnavailableError  this engine cannot run on this machine
    │   └── OutOfMemoryError        the memory asked for is not there
    └── IntegrityError        the memory cache contradicts itself: a bug, please report it

Every message says what happened, the value seen, and what to do next.
"""

from __future__ import annotations


class SwiftVideoError(Exception):
    """Base of every exception that swiftvideo raises on purpose."""


class UsageError(SwiftVideoError, ValueError):
    """The caller asked for something that cannot be done."""


class PromptError(UsageError):
    """A prompt is empty, too long, or has words the tokenizer does not know."""


class SettingsError(UsageError):
    """A setting is out of range or contradicts another."""


class ClosedError(UsageError):
    """The session or pipeline was closed before the call."""


class StoppedError(SwiftVideoError):
    """A chunk was given up because the session's interrupt asked for it."""


class BundleError(SwiftVideoError):
    """A bundle cannot be used."""


class BundleMissingError(BundleError, FileNotFoundError):
    """A file or folder of a bundle is not there."""


class BundleVersionError(BundleError):
    """A bundle was written by an incompatible version."""


class BundleIntegrityError(BundleError):
    """The bytes of a bundle's file are not those that its manifest lists."""


class CheckpointError(SwiftVideoError):
    """A checkpoint's names or shapes do not fit the architecture."""


class EngineError(SwiftVideoError):
    """An engine failed while running."""


class EngineUnavailableError(EngineError):
    """An engine cannot run on this machine."""


class OutOfMemoryError(EngineError, MemoryError):
    """The memory that was asked for is not there."""


class IntegrityError(SwiftVideoError):
    """The memory cache contradicts itself. This is a bug; please report it."""
