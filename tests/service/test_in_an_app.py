"""Clients within programs: other processes, other event loops, other threads, Ctrl-C, far servers."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import grpc
import pytest

from swiftvideo.runtime.errors import ClosedError, UsageError
from swiftvideo.sdk import aio, client as client_module
from swiftvideo.sdk.client import Client

from .harness import CuttingProxy, ServerProcess, proxied

SLOW = 0.4
"""Seconds until a far server is heard first: several times the round trips of TCP and TLS over an ocean."""


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_chunks_go_to_other_processes(server: ServerProcess, encoding: Any) -> None:
    with Client(server.address) as client, client.generate("w1", encoding=encoding, chunks=1) as video:
        (chunk,) = video
    here, there = Pipe()
    here.send(chunk)
    received = there.recv()
    here.close()
    there.close()
    assert received.payloads == chunk.payloads
    assert len(chunk.payloads) == (1 if encoding == "raw" else chunk.frame_count)
    assert (received.index, received.mode, received.timings) == (chunk.index, chunk.mode, chunk.timings)
    assert chunk.payloads[0] is chunk.payloads[0], "a copy at every look"
    assert len(repr(chunk)) < 1000, "a notebook shows it"


USES: dict[str, Callable[[aio.Client, aio.Video], Awaitable[Any]]] = {
    "describe": lambda client, video: client.describe(),
    "generate": lambda client, video: anext(client.generate("w1")),
    "anext": lambda client, video: anext(video),
    "prompt": lambda client, video: video.prompt("w2"),
    "pause": lambda client, video: video.pause(),
    "close": lambda client, video: video.close(),
    "close the client": lambda client, video: client.close(),
}


@pytest.mark.parametrize("use", USES)
def test_a_client_in_another_event_loop_says_so_and_goes_on_in_its_own(
    server: ServerProcess, use: str
) -> None:
    async def elsewhere(client: aio.Client, video: aio.Video) -> None:
        with pytest.raises(UsageError, match="made in another event loop"):
            await asyncio.wait_for(USES[use](client, video), 20)

    async def run() -> None:
        async with aio.Client(server.address) as client, client.generate("w1", credits=1) as video:
            assert (await anext(video)).index == 0
            await asyncio.to_thread(lambda: asyncio.run(elsewhere(client, video)))
            assert (await anext(video)).index == 1

    asyncio.run(run())


def test_a_client_whose_event_loop_is_over_says_so(server: ServerProcess) -> None:
    async def make() -> aio.Client:
        async with aio.Client(server.address) as client:
            return client

    async def open_one() -> aio.Client:
        client = aio.Client(server.address)
        await client.describe()
        return client

    async def use(client: aio.Client) -> None:
        await client.describe()

    with pytest.raises(ClosedError):
        asyncio.run(use(asyncio.run(make())))
    with pytest.raises(UsageError, match="made in another event loop"):
        asyncio.run(use(asyncio.run(open_one())))


@pytest.mark.parametrize("debug", [False, True])
def test_a_video_that_is_dropped_by_another_thread_ends(server: ServerProcess, debug: bool) -> None:
    """Any thread may collect the garbage that a video is part of. The event loop has nothing else to do then."""

    async def run() -> None:
        async with aio.Client(server.address) as client:
            held = [client.generate("w1", credits=1)]
            assert (await anext(held[0])).index == 0
            await asyncio.sleep(0.2)
            await asyncio.to_thread(held.clear)
            left = await asyncio.to_thread(server.idle, 5)
            assert left["sessions"] == 0

    asyncio.run(asyncio.wait_for(run(), 60), debug=debug)


@pytest.fixture
def far(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server that takes its time to say the first word."""
    connected = CuttingProxy._connected

    async def slowly(self: CuttingProxy, *streams: Any) -> None:
        await asyncio.sleep(SLOW)
        await connected(self, *streams)

    monkeypatch.setattr(CuttingProxy, "_connected", slowly)
    with proxied(server.port) as (address, _, _):
        yield address


def test_a_server_far_away_is_reached(far: str) -> None:
    with Client(far) as client:
        assert client.describe().max_credits > 0
    with Client(far) as client, client.generate("w1", chunks=2) as video:
        assert len(list(video)) == 2

    async def run() -> None:
        async with aio.Client(far) as client:
            assert (await client.describe()).max_credits > 0
        async with aio.Client(far) as client, client.generate("w1", chunks=2) as video:
            assert len([chunk async for chunk in video]) == 2

    asyncio.run(run())


def test_ctrl_c_while_a_call_is_made_ends_the_program(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC's channel waits for a thread, when it closes, that is not started where this comes before it."""
    spin = grpc._channel._run_channel_spin_thread

    def interrupted(state: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        spin(state)

    monkeypatch.setattr(grpc._channel, "_run_channel_spin_thread", interrupted)
    with pytest.raises(KeyboardInterrupt), Client(server.address) as client:
        with client.generate("w1") as video:
            for _ in video:
                pass
    assert server.idle(10)["sessions"] == 0


def test_ctrl_c_before_a_call_is_made_leaves_a_client_that_closes(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    with Client(server.address) as client:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(client_module.threading.Thread, "start", interrupted)
            client.generate("w1")


def test_a_client_that_is_closed_while_a_call_is_made_ends_the_loop(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, made = threading.Event(), Client.open

    def late(client: Client, requests: Any) -> Any:
        assert closed.wait(60)
        return made(client, requests)

    monkeypatch.setattr(Client, "open", late)
    client = Client(server.address)
    video = client.generate("w1")
    seen: list[Any] = []
    waiting = threading.Thread(target=lambda: seen.append(next(video, "the end")))
    waiting.start()
    client.close()
    closed.set()
    waiting.join(60)
    assert seen == ["the end"]
