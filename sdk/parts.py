"""Parts of swiftvideo that need libraries which only some installations have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from swiftvideo.runtime.errors import SwiftVideoError


class MissingPartError(SwiftVideoError):
    """A library that only some commands need is not installed."""


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Turn a missing library of an extra into `MissingPartError`; other missing modules stay bugs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("swiftvideo"):
            raise
        raise MissingPartError(
            f"{what} needs {error.name}, which is not installed: pip install 'swiftvideo[{extra}]'"
        ) from error


def silence_grpc() -> None:
    """Keep gRPC's own lines off stderr, unless GRPC_VERBOSITY asks for them. For commands, before gRPC is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
