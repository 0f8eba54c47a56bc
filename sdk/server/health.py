"""grpc.health.v1, which needs no token: so its open streams are few."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

from .status import Refusal

WATCHERS = 64
"""Streams of Watch that are open at once, of all clients."""


class HealthService(aio.HealthServicer):  # type: ignore[misc]
    """Answers Check to all, and Watch to `WATCHERS`."""

    def __init__(self) -> None:
        super().__init__()
        self._watching = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """See grpc.health.v1."""
        if self._watching >= WATCHERS:
            text = f"{self._watching} calls watch the health already: use Check, or try again later"
            await Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after=10.0).end(context)
        self._watching += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watching -= 1
