"""What waits to be sent to one call. Belongs to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from swiftvideo.v1 import generation_pb2 as pb

from .status import Refusal

OUTBOX = 256
"""Messages that may wait for a client; a client that is not reading is not read from beyond that."""


class Outbox:
    """Messages of one call, as bytes, and how the call ends."""

    def __init__(self) -> None:
        self.outcome: pb.Ended | Refusal | None = None
        self.closed = False
        self._messages: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def put(self, message: bytes) -> None:
        """Append a message; nothing after the end."""
        if self.outcome is None:
            self._messages.append(message)
            if len(self._messages) >= OUTBOX:
                self._room.clear()
            self._changed.set()

    def finish(self, outcome: pb.Ended | Refusal) -> None:
        """End the call after what waits; a refusal does not wait."""
        if self.outcome is None:
            if isinstance(outcome, Refusal):
                self._messages.clear()
            else:
                self._messages.append(pb.GenerateResponse(ended=outcome).SerializeToString())
            self.outcome = outcome
            self._room.set()
            self._changed.set()

    def close(self) -> None:
        """The call has ended: nothing is sent any more, and nobody waits for room."""
        self.closed = True
        self._messages.clear()
        self._room.set()
        self._changed.set()

    async def get(self) -> bytes | None:
        """The next message; None after the last."""
        while not self._messages:
            if self.outcome is not None or self.closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._messages.popleft()
        self._room.set()
        return message

    async def room(self) -> None:
        """Wait until the client has read."""
        while len(self._messages) >= OUTBOX and self.outcome is None:
            self._room.clear()
            await self._room.wait()
