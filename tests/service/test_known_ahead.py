"""Prompts that a start brings: heard before chunk 0, whatever the credits, the cuts and the kills."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import grpc
import pytest

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.sdk import aio, remote
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.protocol import MAX_PROMPTS, MAX_TEXT
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.manager import SessionManager
from swiftvideo.sdk.server.metrics import Metrics
from swiftvideo.sdk.server.server import Server
from swiftvideo.sdk.server.status import Refusal
from swiftvideo.v1 import generation_pb2 as pb

from .faults import written
from .harness import (
    CuttingProxy,
    Record,
    ServerProcess,
    credit,
    generate,
    messages,
    reference,
    serving,
    start,
)
from .test_resume import lost

AHEAD = [("w8 w9", 3), ("w20 w21", 4), ("w30", 4), ("w1 w2", 9), ("w5", 1000)]
"""One chunk after another, two that are due at once, and one that never is."""
KNOWN = [pb.Prompt(text=text, at_chunk=at_chunk) for text, at_chunk in AHEAD]
CHUNKS = 12


def check(record: Record, pipeline: Any, seed: int = 3) -> None:
    """Frames are those of a session here that was told everything before its first chunk."""
    assert record.frames == reference(pipeline, seed, CHUNKS, KNOWN)
    assert [item.heard_chunk for item in record.prompts.values()] == [0] * len(AHEAD)


@pytest.mark.parametrize("credits", [1, 16])
def test_a_video_is_that_of_a_session_here_which_was_told_before_its_first_chunk(
    server: ServerProcess, pipeline: Any, credits: int
) -> None:
    record = Record()
    with Client(server.address) as client:
        with client.generate("w1 w2", 3, prompts=AHEAD, credits=credits, chunks=CHUNKS) as video:
            ids = list(video.state.prompts)
            chunks = []
            for chunk in video:
                record.take(video, chunk)
                chunks.append(chunk)
    check(record, pipeline)
    assert [ids.index(chunk.prompt_id) for chunk in chunks if chunk.mode] == [0, 1, 2, 3]
    assert video.state.applied == dict(zip(ids, (3, 4, 5, 9), strict=False))
    late = [pb.Prompt(text=text, at_chunk=at_chunk, heard_chunk=at_chunk) for text, at_chunk in AHEAD]
    assert record.frames != reference(pipeline, 3, CHUNKS, late), "the moment of hearing matters"


def test_one_for_chunk_0_takes_the_place_of_the_first_prompt(server: ServerProcess, pipeline: Any) -> None:
    with Client(server.address) as client:
        with client.generate("w1 w2", 3, prompts=(("w8 w9", 0),), chunks=2) as video:
            frames = [bytes(chunk.frames) for chunk in video]
    assert frames == reference(pipeline, 3, 2, [pb.Prompt(text="w8 w9")])


def test_each_is_accepted_before_chunk_0_and_sending_one_again_is_harmless(server: ServerProcess) -> None:
    prompts = [pb.Prompt(id=f"p{n}", text=f"w{n}", at_chunk=n + 1, heard_chunk=7) for n in range(3)]

    async def run() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generate(channel)
            await call.write(start(credits=1, chunks=2, prompts=prompts))
            await call.write(pb.GenerateRequest(prompt=prompts[1]))
            seen, accepted = [], []
            async for message in messages(call):
                kind = message.WhichOneof("message")
                seen.append(kind)
                if kind == "prompt_accepted":
                    accepted.append(message.prompt_accepted)
                if kind == "chunk":
                    await call.write(credit(message.chunk.index))
        assert seen[:4] == ["started"] + ["prompt_accepted"] * 3 and seen[-1] == "ended"
        assert [(item.id, item.number, item.heard_chunk) for item in accepted] == [
            ("p0", 1, 0),
            ("p1", 2, 0),
            ("p2", 3, 0),
            ("p1", 2, 0),
        ]

    asyncio.run(run())


@pytest.mark.parametrize("heard", range(len(AHEAD) + 1))
def test_a_cut_after_started_takes_nothing(server: ServerProcess, pipeline: Any, heard: int) -> None:
    """However many acceptances had come before it."""

    async def run() -> Record:
        record = Record()
        proxy = CuttingProxy(server.port)
        async with aio.Client(await proxy.start(), timeout=60) as client:
            video = client.generate("w1 w2", 3, prompts=AHEAD, credits=1, chunks=CHUNKS, linger=60)
            async with asyncio.timeout(120), video:
                call = video._connected()
                for _ in range(1 + heard):
                    message = await call.receive()
                    assert message is not None and video.state.take(message) is None
                proxy.cut()
                with pytest.raises(remote.UnavailableError):  # what has come meanwhile is lost, too
                    while await call.receive() is not None:
                        pass
                async for chunk in video:
                    record.take(video, chunk)
        await proxy.close()
        return record

    check(asyncio.run(run()), pipeline)


def test_a_cut_before_started_is_an_error_and_the_session_ends_in_its_time(server: ServerProcess) -> None:
    async def run() -> None:
        proxy = CuttingProxy(server.port)
        async with aio.Client(await proxy.start(), timeout=60) as client:
            video = client.generate("w1 w2", 3, prompts=AHEAD, linger=0.5)
            async with asyncio.timeout(120), video:
                await lost(video, "started")
                proxy.cut()
                with pytest.raises(remote.UnavailableError):
                    await anext(video)
        await proxy.close()

    asyncio.run(run())
    left = server.idle()
    assert (left["sessions"], left["caches"]) == (0, 0)


@pytest.mark.parametrize("chunks", [2, 4], ids=["before the first switch", "between two"])
def test_a_session_from_a_snapshot_knows_them(
    small_bundle: Path, tmp_path: Path, pipeline: Any, chunks: int
) -> None:
    folder = tmp_path / "s"
    arguments = ("--snapshots", str(folder), "--snapshot-chunks", "1", "--max-load", "0")
    record = Record()
    with ServerProcess(small_bundle, *arguments) as running, Client(running.address, timeout=120) as client:
        with client.generate("w1 w2", 3, prompts=AHEAD, credits=1, linger=60, chunks=CHUNKS) as video:
            for _ in range(chunks):
                record.take(video, next(video))
            asyncio.run(written(folder, 1))
            running.kill()
            with ServerProcess(small_bundle, *arguments, port=running.port) as again:
                for chunk in video:
                    record.take(video, chunk)
                assert any("session restored" in line for line in again.log)
    check(record, pipeline)


def test_another_process_that_takes_the_session_up_need_not_know_them(
    server: ServerProcess, pipeline: Any
) -> None:
    with Client(server.address) as client:
        with client.generate("w1 w2", 3, prompts=AHEAD, credits=1, chunks=CHUNKS) as video:
            frames = [bytes(next(video).frames)]
            with client.reattach(video.resume_token, 1) as taken:
                frames += [bytes(chunk.frames) for chunk in taken]
    assert frames == reference(pipeline, 3, CHUNKS, KNOWN)


WRONG = [
    ([("a", "w2"), ("b", "nonsense")], r"start\.prompts\[1\]: this model does not know 'nonsense'"),
    ([("a", "w2"), ("b", " ")], r"start\.prompts\[1\]: the prompt ' ' is empty"),
    ([("a", "w" * (MAX_TEXT + 1))], rf"start\.prompts\[0\]: the prompt has {MAX_TEXT + 1} bytes"),
    ([("a", "w2"), ("a", "w2")], r"start\.prompts\[1\]: its id 'a' is an earlier one's"),
    ([("", "w2")], "a prompt's id has 0 bytes"),
    ([("x" * 65, "w2")], "a prompt's id has 65 bytes"),
    ([(f"{n}", "w2") for n in range(MAX_PROMPTS + 1)], r"start\.prompts has 65 entries: send the first 64"),
]


@pytest.mark.parametrize(("prompts", "text"), WRONG)
def test_one_that_is_wrong_refuses_the_start(
    server: ServerProcess, prompts: list[tuple[str, str]], text: str
) -> None:
    async def run() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generate(channel)
            given = [pb.Prompt(id=id, text=words) for id, words in prompts]
            await call.write(start(prompts=given, linger_ms=60_000))
            with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(run())
    left = server.idle(5)
    assert (left["sessions"], left["caches"]) == (0, 0)


def test_the_clients_say_so(server: ServerProcess) -> None:
    ahead = [("w2", 3), ("nonsense", 6)]
    with Client(server.address) as client, client.generate("w1", prompts=ahead) as video:
        with pytest.raises(remote.RefusedError, match=r"start\.prompts\[1\].*'nonsense'"):
            next(video)

    async def run() -> None:
        async with aio.Client(server.address) as client, client.generate("w1", prompts=ahead) as video:
            with pytest.raises(remote.RefusedError, match=r"start\.prompts\[1\].*'nonsense'"):
                await anext(video)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (["w1 w2"], r"prompts is \['w1 w2'\]: give pairs"),
        ({3: "w1"}, r"prompts is \{3: 'w1'\}: give pairs"),
        (7, "prompts is 7: give pairs"),
        ([(3, "w1")], "the prompt is 3: give a text"),
        ([("w1", "3")], "at_chunk is '3'"),
        ([("w1", -1)], "at_chunk is -1"),
        ([("ä" * 3000, 1)], "the prompt has 6000 bytes"),
        ([("w1", 1)] * 65, "prompts has 65 entries: give the first 64"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_any_call(prompts: Any, text: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(SettingsError, match=text):
        client.generate("w1", prompts=prompts)


def test_as_many_and_as_long_as_may_be_are_heard(server: ServerProcess) -> None:
    longest = [("w1".ljust(MAX_TEXT), 1000 + number) for number in range(MAX_PROMPTS)]
    with Client(server.address) as client, client.generate("w1", prompts=iter(longest)) as video:
        next(video)
        assert len(video.state.accepted) == MAX_PROMPTS
        id = video.prompt("w2")
        while id not in video.state.rejected:
            next(video)
        assert "64 prompts wait" in video.state.rejected[id]


def test_a_server_that_lets_fewer_wait_says_how_many(pipeline: Any) -> None:
    def talk(server: Server, address: str) -> None:
        with Client(address) as client:
            with client.generate("w1", prompts=[("w2", 2), ("w3", 4)], chunks=1) as video:
                assert len(list(video)) == 1
            with client.generate("w1", prompts=[("w2", 2)] * 3) as video:
                with pytest.raises(remote.RefusedError, match="has 3 entries: send the first 2"):
                    next(video)

    serving(pipeline, ServerConfig(port=0, max_pending_prompts=2), talk)


def test_a_server_that_knows_no_such_prompts_is_found_out(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes the field over. A video without its prompts is no video to hand out."""
    begin = SessionManager.start

    async def older(self: SessionManager, client: str, message: pb.Start, peer: str) -> Any:
        del message.prompts[:]
        return await begin(self, client, message, peer)

    monkeypatch.setattr(SessionManager, "start", older)

    def talk(server: Server, address: str) -> None:
        with Client(address) as client, client.generate("w1", prompts=[("w2", 2)]) as video:
            with pytest.raises(remote.RefusedError, match="older than this client"):
                next(video)

    serving(pipeline, ServerConfig(port=0), talk)


def test_a_start_that_breaks_at_any_moment_leaves_nothing(pipeline: Any) -> None:
    async def run() -> None:
        manager = SessionManager(pipeline, ServerConfig(), Metrics())
        prompts = [pb.Prompt(id=f"{number}", text=f"w{number}") for number in range(8)]
        message = pb.Start(prompt="w1", credits=2, linger_ms=60_000, prompts=prompts)
        for steps in itertools.count():
            work = asyncio.create_task(manager.start("ann", message, "test"))
            for _ in range(steps):
                await asyncio.sleep(0.0005)
            if work.done():
                session, _ = work.result()
                manager.give_up(session, "enough was seen")
                break
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            assert not manager.sessions and not manager._starting
        assert steps > 2, "nothing was cut"
        async with asyncio.timeout(30):
            while manager.sessions or manager._open_caches():
                await asyncio.sleep(0.02)
        with pytest.raises(Refusal, match=r"start\.prompts\[0\]"):
            await manager.start("ann", pb.Start(prompt="w1", credits=1, prompts=[pb.Prompt(id="a")]), "test")
        assert not manager.sessions and not manager._starting and not manager._open_caches()
        await manager.close()

    asyncio.run(run())
