"""Logs: one JSON object per line, with the session's id where there is one."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

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


def configure(level: str = "INFO") -> None:
    """Write the logs of swiftvideo to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("swiftvideo")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
