"""grpc.health.v1, which needs no token: so a connection has few of its calls open, and none makes anybody wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc

from .status import Refusal

CALLS = 16
"""That are open at once on a connection: one whose client takes no answer stays open."""
WATCHERS = 64
"""Of Watch that are open at once, of all clients: a connection with one has no end."""


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Tells everybody what `set` was told last. Belongs to the event loop.

    Args:
        names: of the services that it tells about; "" is the server.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._state = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._open: Counter[str] = Counter()
        """Calls of each connection."""
        self._watching = 0

    def set(self, well: bool) -> None:
        """All services serve, or none does."""
        states = pb.HealthCheckResponse
        self._state = states.SERVING if well else states.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """See grpc.health.v1."""
        await self._admit(context)
        if request.service not in self._names:
            known = ", ".join(repr(name) for name in self._names)
            text = f"no service is called {request.service[:64]!r}: use one of {known}"
            await Refusal(grpc.StatusCode.NOT_FOUND, text).end(context)
        return pb.HealthCheckResponse(status=self._state)

    async def List(self, _: pb.HealthListRequest, context: Any) -> pb.HealthListResponse:
        """See grpc.health.v1."""
        await self._admit(context)
        state = pb.HealthCheckResponse(status=self._state)
        return pb.HealthListResponse(statuses=dict.fromkeys(self._names, state))

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> None:
        """See grpc.health.v1."""
        await self._admit(context)
        if self._watching >= WATCHERS:
            text = f"{self._watching} calls watch the health already: use Check, or try again later"
            await Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after=10.0).end(context)
        self._watching += 1
        try:
            await self._tell(context, request.service in self._names)
        finally:
            self._watching -= 1

    async def _tell(self, context: Any, known: bool) -> None:
        """Every change, or at least the last one, until the call is cancelled."""
        told = None
        while True:
            changed = self._changed
            state = self._state if known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if state != told:
                await context.write(pb.HealthCheckResponse(status=state))
                told = state
            await changed.wait()

    async def _admit(self, context: Any) -> None:
        """Count a call until it has ended, or refuse it."""
        peer = context.peer()
        if self._open[peer] >= CALLS:
            text = f"this connection has {CALLS} calls of health open: let one of them end first"
            await Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after=1.0).end(context)
        self._open[peer] += 1
        context.add_done_callback(lambda _: self._ended(peer))

    def _ended(self, peer: str) -> None:
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]
