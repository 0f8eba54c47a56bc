"""Fixtures of the export's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from swiftvideo.export.models import vae


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What diffusers and transformers log, which they would write on stderr."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keeper = Keeper()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(keeper)
    yield lines
    for logger in loggers:
        logger.removeHandler(keeper)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in three dimensions, which the engines for CPUs avoid."""
    monkeypatch.setattr(vae, "_flat", lambda *_: False)
