"""The first message of a call: it comes in time, or the call ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .status import Refusal, invalid, wrong_order


async def first_message(context: Any, seconds: float) -> Any:
    """The first message of a call of grpc.aio, or EOF where there is none.

    A read that comes too late is left to end with its call (docs/decisions/0005). Raises Refusal (DEADLINE_EXCEEDED).
    """
    reading = asyncio.ensure_future(context.read())
    reading.add_done_callback(_heard)
    await asyncio.wait([reading], timeout=seconds)
    if not reading.done():
        raise Refusal(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"no message came within {seconds:g} s: send the first one right after the call begins",
        )
    return reading.result()


def _heard(reading: asyncio.Future[Any]) -> None:
    """A read that nobody waits for any more fails without a word."""
    if not reading.cancelled():
        reading.exception()


class FirstMessages(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Makes calls that take one message wait for it only so long. grpc.aio waits for ever, also for strangers'.

    Args:
        seconds: that the message may take.
        refused: is told of calls that ended for it.
    """

    def __init__(self, seconds: float, refused: Callable[[Refusal], None]) -> None:
        self._seconds = seconds
        self._refused = refused

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler

        work = handler.unary_stream or handler.unary_unary

        async def call(_: Any, context: Any) -> Any:
            try:
                request = await self._request(context)
            except Refusal as refusal:
                self._refused(refusal)
                await refusal.end(context)
            return await work(request, context)

        kind = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return kind(call, handler.request_deserializer, handler.response_serializer)

    async def _request(self, context: Any) -> Any:
        try:
            request = await first_message(context, self._seconds)
        except DecodeError as error:
            raise invalid(f"the bytes are not the message that this call takes ({error})") from error
        if request is grpc.aio.EOF:
            raise wrong_order("the call closed before its message: send one")
        return request
