"""A reattach that fails, at whatever moment, leaves the session to wait as before it, and no longer than it may."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import grpc
import pytest

from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.manager import SessionManager
from swiftvideo.sdk.server.metrics import Metrics
from swiftvideo.sdk.server.reattach import reattach
from swiftvideo.sdk.server.session import ServedSession
from swiftvideo.sdk.server.status import Refusal
from swiftvideo.v1 import generation_pb2 as pb

LINGER = 0.2


async def begun(manager: SessionManager) -> tuple[ServedSession, Any]:
    """A session with a call."""
    start = pb.Start(prompt="w1", credits=2, linger_ms=round(LINGER * 1000))
    return await manager.start("ann", start, "test")


async def nothing_left(manager: SessionManager) -> None:
    """Every session that has no call ends in its time."""
    async with asyncio.timeout(30):
        while manager.sessions or manager._starting or manager._open_caches():
            await asyncio.sleep(0.02)
    await manager.close()


WRONG = [
    ({"prompts": [pb.Prompt(id="", text="w2")]}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"prompts": [pb.Prompt(id="x" * 65, text="w2")]}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"prompts": [pb.Prompt(id="x", text="w2")] * 65}, grpc.StatusCode.INVALID_ARGUMENT),
    ({"next_chunk": 1 << 40}, grpc.StatusCode.INVALID_ARGUMENT),
]


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("fields,code", WRONG)
def test_one_that_is_wrong_changes_nothing(
    pipeline: Any, fields: dict[str, Any], code: grpc.StatusCode, attached: bool
) -> None:
    async def run() -> None:
        manager = SessionManager(pipeline, ServerConfig(), Metrics())
        session, outbox = await begun(manager)
        if not attached:
            manager.detach(session, outbox)
        with pytest.raises(Refusal) as caught:
            await reattach(manager, "ann", pb.Reattach(resume_token=session.token, **fields), "test")
        assert caught.value.code is code
        assert (session.outbox is outbox) is attached and (session.linger_timer is None) is attached
        manager.detach(session, outbox)
        await nothing_left(manager)

    asyncio.run(run())


def test_one_that_comes_too_late_for_a_chunk_leaves_a_restored_session_to_wait(
    pipeline: Any, tmp_path: Path
) -> None:
    async def run() -> None:
        manager = SessionManager(
            pipeline, ServerConfig(snapshots=tmp_path / "s", snapshot_chunks=2), Metrics()
        )
        session, _ = await begun(manager)
        while not session.stored:
            await asyncio.sleep(0.01)
        session.credit(1)
        while session.saved < 4:
            await asyncio.sleep(0.01)
        manager.give_up(session, "as a kill would")
        while manager.sessions:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal) as caught:
            await reattach(manager, "ann", pb.Reattach(resume_token=session.token), "test")
        assert caught.value.code is grpc.StatusCode.OUT_OF_RANGE
        (again,) = manager.sessions.values()
        assert again.recovered and again.linger_timer is not None
        await nothing_left(manager)

    asyncio.run(run())


async def killed(manager: SessionManager) -> ServedSession:
    """A session of which nothing but a snapshot is left."""
    session, _ = await begun(manager)
    while not session.stored:
        await asyncio.sleep(0.01)
    manager.give_up(session, "as a kill would")
    assert manager.recovery is not None
    while manager.sessions or manager.recovery.writes(session):  # a second snapshot may still be on its way
        await asyncio.sleep(0.01)
    return session


@pytest.mark.parametrize("restored", [False, True])
def test_one_of_another_client_is_refused_as_if_there_was_nothing(
    pipeline: Any, tmp_path: Path, restored: bool
) -> None:
    async def run() -> None:
        config = ServerConfig(snapshots=tmp_path / "s", snapshot_chunks=1)
        manager = SessionManager(pipeline, config, Metrics())
        session = await killed(manager) if restored else (await begun(manager))[0]
        call = session.outbox
        message = pb.Reattach(resume_token=session.token)
        for client in ("bob", "", "ann "):
            with pytest.raises(Refusal, match="no session has this resume token") as caught:
                await reattach(manager, client, message, "test")
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
            assert list(manager.sessions.values()) == ([] if restored else [session])
            assert not manager._open_caches() if restored else session.outbox is call
        again, outbox = await reattach(manager, "ann", message, "test")
        assert (again is session) is not restored and again.terms.client == "ann"
        manager.detach(again, outbox)
        await nothing_left(manager)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["session", "chunks", "json", ""])
def test_one_from_a_damaged_snapshot_is_refused_without_the_servers_paths(
    pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A bit of a file, or a whole file, is not what it was."""

    async def run() -> None:
        config = ServerConfig(snapshots=tmp_path / "s", snapshot_chunks=1)
        manager = SessionManager(pipeline, config, Metrics())
        session = await killed(manager)
        if name:
            (path,) = (tmp_path / "s").glob(f"*.{name}")
            data = bytearray(path.read_bytes())
            at = data.index(b"linger") + 9 if name == "json" else len(data) - 1
            data[at] ^= 1
            path.write_bytes(data)
        else:
            next((tmp_path / "s").glob("*.session")).unlink()
        with pytest.raises(Refusal) as caught:
            await reattach(manager, "ann", pb.Reattach(resume_token=session.token), "test")
        assert caught.value.code is grpc.StatusCode.DATA_LOSS
        assert str(caught.value) == "the snapshot of this session cannot be used: start a new one"
        assert str(tmp_path) in caplog.text
        await nothing_left(manager)

    asyncio.run(run())


@pytest.mark.parametrize("restored", [False, True])
def test_one_that_breaks_at_any_moment_leaves_no_session_for_ever(
    pipeline: Any, tmp_path: Path, restored: bool
) -> None:
    async def run() -> None:
        config = ServerConfig(snapshots=tmp_path / "s", snapshot_chunks=1)
        manager = SessionManager(pipeline, config, Metrics())
        prompts = [
            pb.Prompt(id=f"{number}", text=text) for number, text in enumerate(("w2", "nonsense", "w3"))
        ]
        for steps in itertools.count():
            session, outbox = await begun(manager)
            while not session.stored:
                await asyncio.sleep(0.005)
            if restored:
                manager.give_up(session, "as a kill would")
                while manager.sessions:
                    await asyncio.sleep(0.005)
            message = pb.Reattach(resume_token=session.token, next_chunk=1, prompts=prompts)
            work = asyncio.create_task(reattach(manager, "ann", message, "test"))
            for _ in range(steps):
                await asyncio.sleep(0.0005)
            if work.done():
                session, outbox = work.result()
                manager.detach(session, outbox)
                break
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            for left in manager.sessions.values():
                assert left.outbox is None or left.outbox is outbox
                manager.detach(left, outbox)
                assert left.linger_timer is not None
            for left in list(manager.sessions.values()):
                manager.give_up(left, "enough was seen")
        assert steps > 2, "nothing was cut"
        await nothing_left(manager)

    asyncio.run(run())
