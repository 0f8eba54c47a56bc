"""grpc.health.v1, which needs no token: so a connection has few of its calls open, and none makes anybody wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb

from .first import only_message, parser, serialize
from .status import Refusal

SERVICE = "grpc.health.v1.Health"
CALLS = 4
"""That are open at once on a connection: it may send messages that have no end, and take no answers."""
WATCHERS = 64
"""Of Watch that are open at once, of all clients: a connection with one has no end."""


class HealthService:
    """Tells everybody what `set` was told last. Belongs to the event loop.

    Args:
        names: of the services that it tells about; "" is the server.
        seconds: that a call's message may take.
        refused: is told of calls that are refused.
    """

    def __init__(self, names: Sequence[str], seconds: float, refused: Callable[[Refusal], None]) -> None:
        self._names = names
        self._seconds = seconds
        self._refused = refused
        self._state = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._open: Counter[str] = Counter()
        """Calls of each connection."""
        self._watching = 0

    def handler(self) -> Any:
        """For `grpc.aio.Server.add_generic_rpc_handlers`."""
        unary, stream = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        methods = {
            name: kind(self._admitting(work), parser(request), serialize)
            for name, kind, work, request in (
                ("Check", unary, self._check, pb.HealthCheckRequest),
                ("List", unary, self._list, pb.HealthListRequest),
                ("Watch", stream, self._watch, pb.HealthCheckRequest),
            )
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def set(self, well: bool) -> None:
        """All services serve, or none does."""
        states = pb.HealthCheckResponse
        self._state = states.SERVING if well else states.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def _admitting(self, work: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Count a call until it has ended."""

        async def call(_: Any, context: Any) -> Any:
            try:
                self._admit(context)
                return await work(await only_message(context, self._seconds), context)
            except Refusal as refusal:
                self._refused(refusal)
                await refusal.end(context)

        return call

    def _admit(self, context: Any) -> None:
        peer = context.peer()
        if self._open[peer] >= CALLS:
            text = f"this connection has {CALLS} calls of health open: let one of them end first"
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after=1.0)
        self._open[peer] += 1
        context.add_done_callback(lambda _: self._ended(peer))

    def _ended(self, peer: str) -> None:
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]

    async def _check(self, request: pb.HealthCheckRequest, _: Any) -> pb.HealthCheckResponse:
        if request.service not in self._names:
            known = ", ".join(repr(name) for name in self._names)
            text = f"no service is called {request.service[:64]!r}: use one of {known}"
            raise Refusal(grpc.StatusCode.NOT_FOUND, text)
        return pb.HealthCheckResponse(status=self._state)

    async def _list(self, _: pb.HealthListRequest, __: Any) -> pb.HealthListResponse:
        state = pb.HealthCheckResponse(status=self._state)
        return pb.HealthListResponse(statuses=dict.fromkeys(self._names, state))

    async def _watch(self, request: pb.HealthCheckRequest, context: Any) -> None:
        if self._watching >= WATCHERS:
            text = f"{self._watching} calls watch the health already: use Check, or try again later"
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after=10.0)
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
