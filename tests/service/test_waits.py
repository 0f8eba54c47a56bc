"""Waits of the Python clients that end early: cancelled, too late, closed by others, or on a broken connection."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from swiftvideo.runtime.errors import ClosedError
from swiftvideo.sdk import aio, client as client_module, connection, remote
from swiftvideo.sdk.client import Client, Video
from swiftvideo.sdk.messages import start_of
from swiftvideo.sdk.remote import VideoState
from swiftvideo.v1 import generation_pb2 as pb

from .harness import CuttingProxy, ServerProcess, proxied, reference


@pytest.fixture(autouse=True)
def nothing_left(server: ServerProcess) -> Iterator[None]:
    """Whatever a test does, its sessions end at once: their linger time is much longer than this waits."""
    yield
    assert server.idle(5)["sessions"] == 0


async def cancelled(video: aio.Video) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(video), 0.05)


async def too_late(video: aio.Video) -> None:
    video._deadline = 0.05
    with pytest.raises(remote.DeadlineError, match=r"within 0\.05 s"):
        await anext(video)
    video._deadline = None


@pytest.mark.parametrize("give_up", [cancelled, too_late])
@pytest.mark.parametrize("linger", [0.0, 30.0])
def test_the_next_anext_goes_on_where_one_was_given_up(
    server: ServerProcess, pipeline: Any, give_up: Callable[[aio.Video], Awaitable[None]], linger: float
) -> None:
    async def run() -> list[bytes]:
        made = []
        async with (
            aio.Client(server.address) as client,
            client.generate("w1 w2", seed=4, credits=1, linger=linger) as video,
        ):
            made.append(bytes((await anext(video)).frames))
            for _ in range(3):
                await video.pause()
                await give_up(video)
                await give_up(video)
                await video.resume()
                made.append(bytes((await anext(video)).frames))
        return made

    assert asyncio.run(run()) == reference(pipeline, 4, 4, [])


@pytest.mark.parametrize("linger", [0.0, 30.0])
def test_a_deadline_leaves_the_sync_video_as_it_is(
    server: ServerProcess, pipeline: Any, linger: float
) -> None:
    made = []
    with (
        Client(server.address) as client,
        client.generate("w1 w2", seed=4, credits=1, linger=linger, deadline=20) as video,
    ):
        made.append(bytes(next(video).frames))
        for _ in range(3):
            video.pause()
            video._deadline = 0.05
            for _ in range(2):
                with pytest.raises(TimeoutError, match=r"no chunk came within 0\.05 s"):
                    next(video)
            video._deadline = 20
            video.resume()
            made.append(bytes(next(video).frames))
    assert made == reference(pipeline, 4, 4, [])


@pytest.mark.parametrize("cancels", [1, 2])
def test_handlers_that_are_cancelled_end_their_sessions(server: ServerProcess, cancels: int) -> None:
    async def run() -> None:
        async with aio.Client(server.address) as client:
            for credits in (1, 8):
                playing = asyncio.Event()

                async def handler(credits: int, playing: asyncio.Event) -> None:
                    async with client.generate("w1", credits=credits) as video:
                        async for _ in video:
                            playing.set()

                task = asyncio.create_task(handler(credits, playing))
                await playing.wait()
                for _ in range(cancels):
                    task.cancel()
                    await asyncio.sleep(0)
                with pytest.raises(asyncio.CancelledError):
                    await task
            while await client.sessions():  # the second cancel leaves the wait for the end, not the end
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_tasks_that_iterate_together_take_turns(server: ServerProcess) -> None:
    async def run() -> list[int]:
        async with aio.Client(server.address) as client, client.generate("w1", chunks=6) as video:

            async def some() -> list[int]:
                return [chunk.index async for chunk in video]

            first, second = await asyncio.gather(some(), some())
            return sorted(first + second)

    assert asyncio.run(run()) == list(range(6))


def test_a_video_may_be_closed_while_another_thread_waits_for_it(server: ServerProcess) -> None:
    ends: list[BaseException | None] = []

    def play(video: Video, first: threading.Event) -> None:
        try:
            for _ in video:
                first.set()
            ends.append(None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            ends.append(error)

    with Client(server.address) as client:
        for round in range(12):
            video, first = client.generate("w1", credits=1 + round % 3), threading.Event()
            thread = threading.Thread(target=play, args=(video, first))
            thread.start()
            assert first.wait(20)
            time.sleep(0.002 * round)
            video.close()
            thread.join(20)
        assert client.sessions() == []
    assert [end for end in ends if not isinstance(end, ClosedError | None)] == [] and len(ends) == 12


def test_close_ends_a_session_whose_connection_broke(server: ServerProcess) -> None:
    with proxied(server.port) as (address, proxy, loop), Client(address) as client:
        with client.generate("w1") as video:
            next(video)
            loop.call_soon_threadsafe(proxy.cut)
        assert proxy.cuts == 1

    async def run() -> None:
        proxy = CuttingProxy(server.port)
        async with aio.Client(await proxy.start()) as client:
            async with client.generate("w1") as video:
                await anext(video)
                proxy.cut()
        await proxy.close()

    asyncio.run(run())


def test_a_video_that_is_dropped_ends_its_session(server: ServerProcess) -> None:
    with Client(server.address) as client:
        next(client.generate("w1"))
        assert server.idle(5)["sessions"] == 0

    async def run() -> None:
        async with aio.Client(server.address) as client:
            async for _ in client.generate("w1"):
                break
            while await client.sessions():
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("kept", [True, False])
def test_a_client_that_is_closed_ends_its_sessions(server: ServerProcess, kept: bool) -> None:
    """At once, though each would linger: those of videos that are still held, and of those that were just dropped."""
    with Client(server.address) as operator:
        for _ in range(3):
            with Client(server.address) as client:
                videos = [client.generate("w1") for _ in range(3)]
                assert [next(video).index for video in videos] == [0, 0, 0]
                assert len(operator.sessions()) == 3
                if not kept:
                    videos.clear()
            assert operator.sessions() == []
            for video in videos:
                video.close()
                with pytest.raises(ClosedError):
                    next(video)

        async def run() -> None:
            for _ in range(3):
                async with aio.Client(server.address) as client:
                    videos = [client.generate("w1") for _ in range(3)]
                    for video in videos:
                        assert (await anext(video)).index == 0
                    assert len(operator.sessions()) == 3
                    if not kept:
                        del video
                        videos.clear()
                assert operator.sessions() == []
                for video in videos:
                    await video.close()
                    with pytest.raises(ClosedError):
                        await anext(video)

        asyncio.run(run())


def test_a_client_that_is_closed_ends_a_session_whose_connection_broke(server: ServerProcess) -> None:
    with Client(server.address) as operator:
        with proxied(server.port) as (address, proxy, loop), Client(address) as client:
            video = client.generate("w1")
            next(video)
            loop.call_soon_threadsafe(proxy.cut)
            while operator.sessions()[0].attached:
                pass
            client.close()
            assert proxy.cuts == 1 and operator.sessions() == []

        async def run() -> None:
            proxy = CuttingProxy(server.port)
            async with aio.Client(await proxy.start()) as client:
                video = client.generate("w1")
                await anext(video)
                proxy.cut()
                while operator.sessions()[0].attached:
                    await asyncio.sleep(0)
            assert proxy.cuts == 1 and operator.sessions() == []
            await proxy.close()

        asyncio.run(run())


def test_a_client_waits_once_for_a_server_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0

    def join(_: object, seconds: float) -> None:
        nonlocal now
        now += max(0.0, seconds)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"127.0.0.1:{silent.getsockname()[1]}")
        videos = [client.generate("w1") for _ in range(4)]
        monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: now))
        monkeypatch.setattr(client_module._Call, "join", join)
        client.close()
        assert now == 1000 + remote.CLOSING and len(videos) == 4


def test_a_cut_after_a_long_wait_is_mended(server: ServerProcess) -> None:
    wait = 0.6  # more than the client's timeout
    with (
        proxied(server.port) as (address, proxy, loop),
        Client(address, timeout=0.3) as client,
        client.generate("w1", credits=1) as video,
    ):
        next(video)
        video.pause()
        timer = threading.Timer(wait, lambda: (loop.call_soon_threadsafe(proxy.cut), video.resume()))
        timer.start()
        assert next(video).index == 1 and proxy.cuts == 1

    async def run() -> None:
        proxy = CuttingProxy(server.port)
        async with aio.Client(await proxy.start(), timeout=0.3) as client:
            async with client.generate("w1", credits=1) as video:
                await anext(video)
                await video.pause()
                waiting = asyncio.create_task(anext(video))
                await asyncio.sleep(wait)
                proxy.cut()
                await video.resume()
                assert (await waiting).index == 1 and proxy.cuts == 1
        await proxy.close()

    asyncio.run(run())


def test_an_outage_counts_from_its_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(remote.time, "monotonic", lambda: now)
    state = VideoState(start_of("w1", 0, 1, "raw", None, 30.0, 0))
    started = pb.GenerateResponse(started=pb.Started(resume_token="t", linger_ms=1000))
    broken = remote.UnavailableError("gone", grpc.StatusCode.UNAVAILABLE)
    state.take(started)
    for _ in range(2):
        pauses = []
        for now in (now + 50, now + 54, now + 59):  # noqa: B007, B020 - the clock
            pauses.append(state.pause_before(broken, 10))
        assert pauses == list(remote.BACKOFF[:3])
        now += 2
        with pytest.raises(remote.UnavailableError, match="gone"):
            state.pause_before(broken, 10)
        state._attempts = 0
    state.pause_before(broken, 10)
    state.take(started)  # the server is there: what breaks now is another outage
    now += 100
    state.pause_before(broken, 10)


def test_a_session_that_is_taken_up_is_asked_for_again() -> None:
    """The server's refusal may be lost with the call; the second call hears it."""
    state = remote.VideoState.taken_up("token", 3)
    broken = remote.UnavailableError("the connection broke", grpc.StatusCode.UNAVAILABLE)
    assert state.pause_before(broken, 10) == remote.BACKOFF[0]
    with pytest.raises(remote.SessionLostError, match="no session"):
        state.pause_before(remote.SessionLostError("no session", grpc.StatusCode.NOT_FOUND), 10)


def test_a_connection_that_carries_nothing_any_more_is_given_up(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a twentieth of the client's times."""
    faster = [
        (name, value // 20 if name.endswith(("time_ms", "timeout_ms")) else value)
        for name, value in connection.OPTIONS
    ]
    monkeypatch.setattr(connection, "OPTIONS", faster)
    with (
        proxied(server.port) as (address, proxy, loop),
        Client(address) as client,
        client.generate("w1", deadline=20) as video,
    ):
        next(video)
        loop.call_soon_threadsafe(proxy.swallow)
        while next(video).index < 8:
            pass
