"""A proxy that stays while its connection to the server goes: it resets the call, and the client goes on."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Any

import pytest

from swiftvideo.sdk import aio
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.server import Server

from .harness import CuttingProxy, Record, serving
from .peers import HEADERS, PREFACE, RESET, frame

INTERNAL_ERROR, CANCEL = 2, 8
"""Of RFC 9113, 7: what nginx resets a call with when the server is killed, and what HAProxy does."""
CHUNKS = 6


class ResettingProxy(CuttingProxy):
    """Carries HTTP/2 in clear text frame by frame, and resets the calls that are open on both sides when told to."""

    def __init__(self, port: int, code: int) -> None:
        super().__init__(port)
        self._code = struct.pack(">I", code)
        self._streams: set[int] = set()
        self.resets = 0

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asks = writer.get_extra_info("peername")[1] == self._port
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            if asks:
                writer.write(await reader.readexactly(len(PREFACE)))
            while True:
                head = await reader.readexactly(9)
                if asks and head[3] == HEADERS:
                    self._streams.add(struct.unpack(">I", head[5:])[0])
                writer.write(head + await reader.readexactly(int.from_bytes(head[:3], "big")))
                await writer.drain()
        writer.close()

    def reset(self) -> None:
        """End every call without a word; the connections stay."""
        for stream in self._streams:
            for end in self._writers:
                end.write(frame(RESET, 0, stream, self._code))
        self.resets += len(self._streams)
        self._streams.clear()


@pytest.mark.parametrize("code", [INTERNAL_ERROR, CANCEL])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_a_proxy_resets_goes_on(pipeline: Any, code: int, asynchronous: bool) -> None:
    record = Record()

    async def watch(server: Server) -> None:
        proxy = ResettingProxy(server.port, code)
        address = await proxy.start()
        if asynchronous:
            async with aio.Client(address) as client, client.generate("w1 w2", 3) as video:
                async for chunk in video:
                    record.take(video, chunk)
                    if chunk.index == CHUNKS - 1:
                        break
                    if chunk.index in (1, 3):
                        proxy.reset()
        else:
            with Client(address) as client, client.generate("w1 w2", 3) as video:
                for _ in range(CHUNKS):
                    chunk = await asyncio.to_thread(next, video)
                    record.take(video, chunk)
                    if chunk.index in (1, 3):
                        proxy.reset()
                await asyncio.to_thread(video.close)
                await asyncio.to_thread(client.close)
        assert proxy.resets == 2
        await proxy.close()

    serving(pipeline, ServerConfig(port=0), lambda server, _: asyncio.run(watch(server)))
    assert not record.differing(pipeline, 3)
