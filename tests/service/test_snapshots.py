"""Snapshots are written beside the sessions: a slow or a full disk costs snapshots, and no session a chunk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime import Session, tensorfile
from swiftvideo.runtime.errors import OutOfMemoryError, SwiftVideoError
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server import recovery
from swiftvideo.sdk.server.admission import Admission
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.drain import drain
from swiftvideo.sdk.server.manager import SessionManager
from swiftvideo.sdk.server.metrics import Metrics
from swiftvideo.sdk.server.reattach import reattach
from swiftvideo.sdk.server.saving import Copies
from swiftvideo.sdk.server.server import Server
from swiftvideo.sdk.server.session import ServedSession, token_hash
from swiftvideo.sdk.server.status import Refusal
from swiftvideo.sdk.server.store import Store
from swiftvideo.v1 import generation_pb2 as pb

from .harness import serving
from .test_ending import Gate, begun, give_up, stop, until

EVERY = 3


def config(folder: Path, **fields: Any) -> ServerConfig:
    return ServerConfig(
        **{"port": 0, "snapshots": folder, "snapshot_chunks": EVERY, "max_load": None, **fields}
    )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Writes nothing until it may."""
    gate = Gate()
    replace = tensorfile.replace

    def slow(*arguments: Any) -> None:
        gate()
        replace(*arguments)

    monkeypatch.setattr(tensorfile, "replace", slow)
    yield gate
    gate.open.set()


def manage(
    pipeline: Any, folder: Path, work: Callable[[SessionManager], Any], **fields: Any
) -> dict[str, float]:
    """Do something with a manager, and close it; values of its metrics."""

    async def run() -> Metrics:
        manager = SessionManager(pipeline, config(folder, **fields), Metrics())
        await work(manager)
        await manager.close()
        return manager.metrics

    value = asyncio.run(run()).registry.get_sample_value
    names = ("snapshots_total", "snapshot_failures_total", "snapshot_seconds_count")
    return {name: value(f"swiftvideo_{name}") or 0 for name in names}


async def play(session: ServedSession, to: int) -> None:
    """Present every chunk until so many are there."""
    while session.delivered < to:
        if session.delivered > session.presented:
            session.credit(session.delivered - 1)
        await asyncio.sleep(0.001)


def test_a_slow_disk_delays_no_chunk_of_any_session(pipeline: Any, tmp_path: Path, disk: Gate) -> None:
    def talk(server: Server, address: str) -> None:
        with (
            Client(address) as client,
            client.generate("w1", linger=60, deadline=60) as saved,
            client.generate("w2", linger=0, deadline=60) as other,
        ):
            for _ in range(4 * EVERY):
                next(saved), next(other)
            assert disk.reached.is_set()
            session = next(s for s in server.manager.sessions.values() if s.saver is not None)
            assert session.saved == 0 and not session.stored
            value = server.metrics.registry.get_sample_value
            assert value("swiftvideo_unsaved_chunks") >= 4 * EVERY
            assert value("swiftvideo_snapshot_failures_total") in (2, 3), (
                "those after 6, 9 and perhaps 12 chunks"
            )
            disk.open.set()
            while session.saved < 5 * EVERY:
                next(saved)

    serving(pipeline, config(tmp_path / "s"), talk)


def test_what_is_written_is_the_session_after_its_chunk_though_it_goes_on(
    pipeline: Any, tmp_path: Path, disk: Gate
) -> None:
    """Byte for byte what is saved at that chunk; and beside it are the chunks that were not presented then."""

    async def work(manager: SessionManager) -> None:
        session = await begun(manager, credits=2 * EVERY)
        await manager.prompt(session, pb.Prompt(id="a", text="w5"))
        await until(lambda: "a" in session.prompts)
        heard = session.prompts["a"].heard
        await until(lambda: session.delivered == 2 * EVERY)
        session.stop()  # so that no other snapshot follows
        session.credit(EVERY)
        disk.open.set()
        await until(lambda: session.saved == EVERY)
        assert manager.recovery is not None
        stored = manager.recovery.store.find(token_hash(session.token))
        assert stored is not None and (stored.index, stored.presented) == (EVERY, 0)
        assert [kept.index for kept in manager.recovery.store.chunks(stored)] == list(range(EVERY))
        with pipeline.session("w1") as alone:
            for index in range(EVERY):
                if index == heard:
                    alone.prompt("w5")
                next(alone)
            alone.save(tmp_path / "alone")
        written = Path(manager.recovery.store.session_path(session.id, EVERY)).read_bytes()
        assert written == (tmp_path / "alone").read_bytes()

    manage(pipeline, tmp_path / "s", work)


@pytest.mark.parametrize(("count", "most"), [(3, 1), (3, 2), (1, 2)])
def test_so_many_snapshots_are_in_memory_and_no_more(
    pipeline: Any, tmp_path: Path, disk: Gate, count: int, most: int
) -> None:
    """And one of each session. The others are taken as soon as there is room."""
    there = min(count, most)

    async def work(manager: SessionManager) -> None:
        sessions = [await begun(manager, credits=2) for _ in range(count)]
        await asyncio.gather(*(play(session, 3 * EVERY) for session in sessions))
        assert manager.recovery is not None and len(manager.recovery.copies) == there
        assert sum(s.saver is not None and s.saver.writing for s in sessions) == there
        disk.open.set()
        for session in sessions:
            await play(session, session.delivered + EVERY)
            await until(lambda: session.saved >= 3 * EVERY or session.stored)  # noqa: B023
        assert all(session.stored for session in sessions)
        await until(lambda: not manager.recovery or not len(manager.recovery.copies))

    found = manage(pipeline, tmp_path / "s", work, snapshot_writes=most)
    assert found["snapshots_total"] == found["snapshot_seconds_count"] >= count
    assert found["snapshot_failures_total"] >= count, "of those that were due while they waited"


def test_a_session_that_is_taken_up_waits_for_its_snapshot(pipeline: Any, tmp_path: Path, disk: Gate) -> None:
    """It is the first one, and the session that it is of has gone."""

    async def work(manager: SessionManager) -> None:
        session = await begun(manager, credits=EVERY)
        await until(disk.reached.is_set)
        await until(lambda: session.delivered == EVERY)
        give_up(manager, session)
        message = pb.Reattach(resume_token=session.token, next_chunk=EVERY)
        with pytest.raises(Refusal, match="not free yet: reattach again"):
            await reattach(manager, "ann", message, "test")
        await until(lambda: not manager.sessions)
        again = asyncio.create_task(reattach(manager, "ann", message, "test"))
        assert not (await asyncio.wait([again], timeout=0.2))[0]
        disk.open.set()
        restored, _ = await again
        assert restored.id == session.id and restored.delivered == EVERY
        await play(restored, 2 * EVERY)

    manage(pipeline, tmp_path / "s", work)


def test_closing_waits_for_what_is_being_written(pipeline: Any, tmp_path: Path, disk: Gate) -> None:
    async def work(manager: SessionManager) -> None:
        await begun(manager, credits=EVERY)
        await until(disk.reached.is_set)
        closing = asyncio.create_task(manager.close())
        assert not (await asyncio.wait([closing], timeout=0.2))[0]
        disk.open.set()
        await closing

    assert manage(pipeline, tmp_path / "s", work)["snapshots_total"] == 1
    assert len(list((tmp_path / "s").iterdir())) == 3


@pytest.mark.parametrize("in_time", [True, False])
def test_a_drain_saves_the_last_chunk_after_what_is_being_written_and_does_not_wait_for_ever(
    pipeline: Any, tmp_path: Path, disk: Gate, in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swiftvideo.sdk.server.drain.SAVING", 30.0 if in_time else 0.1)

    async def work(manager: SessionManager) -> None:
        sessions = [await begun(manager, credits=EVERY + 1) for _ in range(3)]
        await until(lambda: all(session.delivered == EVERY + 1 for session in sessions))
        draining = asyncio.create_task(drain(manager))
        assert bool((await asyncio.wait([draining], timeout=0.5))[0]) is not in_time
        disk.open.set()
        await draining
        assert [session.saved for session in sessions] == [EVERY + 1 if in_time else 0] * 3
        assert manager.recovery is not None
        await manager.recovery.close()
        found = [manager.recovery.store.find(token_hash(session.token)) for session in sessions]
        late = [stored.index for stored in found if stored is not None]
        assert late == [EVERY + 1] * 3 if in_time else 1 <= len(late) <= 2

    manage(pipeline, tmp_path / "s", work, grace=0.0)


def test_a_session_that_is_stopped_while_it_is_written_leaves_nothing(
    pipeline: Any, tmp_path: Path, disk: Gate
) -> None:
    """And nothing counts as a failure."""

    async def work(manager: SessionManager) -> None:
        session = await begun(manager, credits=EVERY)
        await until(disk.reached.is_set)
        await until(lambda: session.delivered == EVERY)
        stop(manager, session)
        with pytest.raises(Refusal, match="no session has this resume token"):
            await reattach(manager, "ann", pb.Reattach(resume_token=session.token), "test")
        disk.open.set()
        await until(lambda: not manager.sessions)

    found = manage(pipeline, tmp_path / "s", work)
    assert not list((tmp_path / "s").iterdir())
    assert (found["snapshots_total"], found["snapshot_failures_total"]) == (0, 0)


def test_prompts_are_read_while_a_session_is_loaded(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    load = recovery.Recovery._load

    def slow(*arguments: Any) -> Any:
        gate()
        return load(*arguments)

    monkeypatch.setattr(recovery.Recovery, "_load", slow)

    async def work(manager: SessionManager) -> None:
        session = await begun(manager, credits=EVERY)
        await until(lambda: session.stored)
        give_up(manager, session)
        await until(lambda: not manager.sessions)
        message = pb.Reattach(resume_token=session.token, next_chunk=EVERY)
        loading = asyncio.create_task(reattach(manager, "ann", message, "test"))
        await until(gate.reached.is_set)
        async with asyncio.timeout(30):
            other = await begun(manager)
            await manager.prompt(other, pb.Prompt(id="a", text="w2"))
        assert not loading.done()
        gate.open.set()
        await loading

    manage(pipeline, tmp_path / "s", work)


@pytest.mark.parametrize("where", ["taking", "out of memory", "the session's file", "the rest"])
def test_what_goes_wrong_costs_the_snapshots_and_not_the_session(
    where: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise {
            "taking": OutOfMemoryError("no memory"),
            "out of memory": MemoryError(),
            "the session's file": SwiftVideoError("no space left"),
            "the rest": OSError("no space left"),
        }[where]

    if where == "the rest":
        monkeypatch.setattr(Store, "write", fails)
    elif where == "the session's file":
        monkeypatch.setattr(tensorfile, "replace", fails)
    else:
        monkeypatch.setattr(Session, "snapshot", fails)

    async def work(manager: SessionManager) -> None:
        session = await begun(manager, credits=1)
        for failures in (1, 2):
            await play(session, failures * EVERY)
            await until(lambda: manager.metrics.snapshot_failures._value.get() == failures)  # noqa: B023
        assert not session.over and not session.stored and session.saved == 0
        await until(lambda: manager.recovery is not None and len(manager.recovery.copies) == 0)

    found = manage(pipeline, tmp_path / "s", work)
    assert (found["snapshots_total"], found["snapshot_failures_total"]) == (0, 2)


@pytest.mark.parametrize("enough", [True, False])
def test_a_folder_that_is_too_small_for_the_model_is_told_of_at_once(
    pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, enough: bool
) -> None:
    async def work(manager: SessionManager) -> None:
        tensors: Any = (await begun(manager)).job.session._rollout.tensors
        assert manager.admission.cache_bytes == tensors._cache.k.nbytes + tensors._cache.v.nbytes

    size = Admission(ServerConfig(), pipeline).cache_bytes
    space = size * (6 if enough else 5.5) / (1 << 30)
    manage(pipeline, tmp_path / "s", work, snapshot_space=space, max_sessions=3)
    assert (
        "room for 5 snapshots of this model, and 3 sessions need twice as many" in caplog.text
    ) is not enough


def test_no_more_are_reserved_than_there_may_be_whatever_the_threads() -> None:
    copies = Copies(3)
    got: list[bool] = []
    threads = [threading.Thread(target=lambda: got.append(copies.reserve())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 13 + [True] * 3 and len(copies) == 3

    def fails() -> Any:
        raise OutOfMemoryError("no memory")

    with pytest.raises(OutOfMemoryError):
        copies.taken(fails)
    assert len(copies) == 2 and copies.reserve()
