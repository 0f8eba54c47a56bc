"""The first message of a call: it comes in time, or the call ends. grpc.aio itself waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from .status import Refusal, invalid, wrong_order


async def first_message(context: Any, seconds: float) -> Any:
    """The first message of a call that takes a stream, or EOF where there is none.

    A read that comes too late is left to end with its call (docs/decisions/0005). Raises Refusal.
    """
    reading = asyncio.ensure_future(context.read())
    reading.add_done_callback(_heard)
    await asyncio.wait([reading], timeout=seconds)
    if not reading.done():
        raise Refusal(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"no message came within {seconds:g} s: send the first one right after the call begins",
        )
    message = reading.result()
    if isinstance(message, DecodeError):
        raise malformed(message)
    return message


async def only_message(context: Any, seconds: float) -> Any:
    """The message of a call that takes one. Raises Refusal.

    Such calls are handled as if they took a stream: what takes one message alone hears of no call without it.
    """
    message = await first_message(context, seconds)
    if message is grpc.aio.EOF:
        raise wrong_order("the call closed before its message: send one")
    return message


def parser(kind: type[Message]) -> Callable[[bytes], Message | DecodeError]:
    """Reads a message; bytes that are none are the error, so that they become INVALID_ARGUMENT and no traceback."""

    def parse(data: bytes) -> Message | DecodeError:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return error

    return parse


def malformed(error: DecodeError) -> Refusal:
    """Of bytes that `parser` could not read."""
    return invalid(
        f"the bytes are not a message that this call takes ({error}): generate your code from its .proto"
    )


def serialize(message: Message) -> bytes:
    """The bytes of a message."""
    return message.SerializeToString()


def _heard(reading: asyncio.Future[Any]) -> None:
    """A read that nobody waits for any more fails without a word."""
    if not reading.cancelled():
        reading.exception()
