"""Logs: one JSON object per line, with the session's id where there is one."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from swiftvideo.runtime.errors import SettingsError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_FIELDS = (
    "session",
    "client",
    "code",
    "reason",
    "chunks",
    "seconds",
    "peer",
    "address",
    "metrics",
    "sessions",
    "left_out",
)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and those of `_FIELDS` that were given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = time.gmtime(record.created)
        fields: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class Sparing:
    """Logs a line a second at most, and how many it left out before."""

    def __init__(self, logger: logging.Logger, seconds: float = 1.0) -> None:
        self._logger = logger
        self._seconds = seconds
        self._next = 0.0
        self._left_out = 0

    def warning(self, text: str, **fields: object) -> None:
        """Log, or count."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        self._logger.warning("%s", text, extra={**fields, "left_out": self._left_out})
        self._next, self._left_out = now + self._seconds, 0


def configure(level: str = "INFO") -> None:
    """Write logs to stderr: swiftvideo's from `level` on, warnings of everything else, and Python's own.

    Raises SettingsError for an unknown level.
    """
    if level not in LEVELS:
        raise SettingsError(f"log level is {level!r}: use one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(_not_of_a_peer)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("swiftvideo").setLevel(level)
    logging.captureWarnings(True)


def _not_of_a_peer(record: logging.LogRecord) -> bool:
    """grpc.aio logs a traceback where a peer breaks a call while it is answered, which is no error of ours."""
    return not record.exc_info or getattr(record.exc_info[0], "__name__", "") != "ExecuteBatchError"
