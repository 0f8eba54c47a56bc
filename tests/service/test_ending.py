"""How sessions end: the engine's thread frees their memory, and no snapshot outlives what it is of."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from swiftvideo.runtime import Pipeline, Session, Snapshot
from swiftvideo.runtime.errors import EngineError, StoppedError
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.drain import end_drained
from swiftvideo.sdk.server.engine import EngineThread, Job
from swiftvideo.sdk.server.manager import SessionManager
from swiftvideo.sdk.server.metrics import Metrics
from swiftvideo.sdk.server.reattach import reattach
from swiftvideo.sdk.server.server import Server
from swiftvideo.sdk.server.session import ServedSession, token_hash
from swiftvideo.sdk.server.status import Refusal
from swiftvideo.v1 import generation_pb2 as pb

from .test_turns import Collected, FakeSession

End = Callable[[SessionManager, ServedSession], None]


class Gate:
    """Work that waits until it may."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self.reached.set()
        assert self.open.wait(60)


def stop(manager: SessionManager, session: ServedSession) -> None:
    manager.end(session, pb.Ended.REASON_STOPPED, "the client asked for it")


def give_up(manager: SessionManager, session: ServedSession) -> None:
    manager.give_up(session, "nobody reattached in time")


def drained(manager: SessionManager, session: ServedSession) -> None:
    end_drained(session)


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.005)


async def begun(manager: SessionManager, credits: int = 1) -> ServedSession:
    """A session with a call."""
    session, _ = await manager.start("ann", pb.Start(prompt="w1", credits=credits, linger_ms=60_000), "test")
    return session


def held(job: Job) -> Gate:
    """Let the next chunk of a session wait until it may end."""
    gate = Gate()
    tensors = job.session._rollout.tensors
    decode = tensors.decode

    def slow(latents: Any) -> Any:
        gate()
        return decode(latents)

    tensors.decode = slow
    return gate


def running(
    pipeline: Any, work: Callable[[SessionManager], Any], folder: Path | None = None, every: int = 1
) -> None:
    """Do something with a manager, and close it."""

    async def run() -> None:
        manager = SessionManager(pipeline, ServerConfig(snapshots=folder, snapshot_chunks=every), Metrics())
        await work(manager)
        await manager.close()

    asyncio.run(run())


def busy() -> tuple[EngineThread, Gate]:
    """An engine's thread in a chunk, and what lets it end."""
    engine, gate = EngineThread(), Gate()
    job = Job(FakeSession(gate), Collected(), 1.0)  # type: ignore[arg-type]
    engine.add(job)
    engine.update(job, limit=1, held=False)
    assert gate.reached.wait(60)
    return engine, gate


def test_a_session_that_rests_is_closed_by_the_engine_and_nobody_waits() -> None:
    engine, gate = busy()
    session, done = FakeSession(), Collected()
    job = Job(session, done, 1.0)  # type: ignore[arg-type]
    engine.add(job)
    engine.cancel(job)
    assert session.closed_in == "" and done.made == []
    gate.open.set()
    (made,) = done.wait(1)
    assert isinstance(made.error, StoppedError) and session.closed_in == "swiftvideo-engine"
    assert session.index == 0, "no chunk was begun"
    engine.cancel(job)
    assert engine.stop(60) and len(done.made) == 1


def test_a_stuck_engine_is_left_behind_and_ends_all_sessions_once_it_goes_on() -> None:
    engine, gate = busy()
    session, done = FakeSession(), Collected()
    engine.add(Job(session, done, 1.0))  # type: ignore[arg-type]
    assert not engine.stop(0.05) and session.closed_in == ""
    gate.open.set()
    assert isinstance(done.wait(1)[0].error, StoppedError) and session.closed_in == "swiftvideo-engine"
    assert engine.stop(60)


def test_a_session_that_does_not_close_takes_no_other_with_it() -> None:
    class Broken(FakeSession):
        def close(self) -> None:
            raise EngineError("the device is gone")

    engine = EngineThread()
    bad, good = Collected(), Collected()
    jobs = [Job(Broken(), bad, 1.0), Job(FakeSession(), good, 1.0)]  # type: ignore[arg-type]
    for job in jobs:
        engine.add(job)
    engine.cancel(jobs[0])
    assert isinstance(bad.wait(1)[0].error, StoppedError)
    engine.update(jobs[1], limit=2, held=False)
    assert [made.error for made in good.wait(2)] == [None, None]
    assert engine.stop(60)


@pytest.mark.parametrize("crash", [True, False])
def test_an_engine_that_has_ended_takes_no_session(crash: bool) -> None:
    engine = EngineThread()

    def bug(*_: Any) -> None:
        raise RuntimeError("a bug")

    if crash:
        engine._serve = bug  # type: ignore[method-assign]
        last = Job(FakeSession(), Collected(), 1.0)  # type: ignore[arg-type]
        engine.add(last)
        engine.update(last, limit=1, held=False)
        engine._thread.join(60)
    else:
        assert engine.stop(60)
    session, done = FakeSession(), Collected()
    engine.add(Job(session, done, 1.0))  # type: ignore[arg-type]
    (made,) = done.made
    assert isinstance(made.error, EngineError) and session.closed_in


def test_a_session_that_comes_after_a_crash_of_the_engine_ends(pipeline: Any) -> None:
    async def work(manager: SessionManager) -> None:
        assert manager.engine.stop(60)  # as after a crash that the event loop has not heard of
        session = await begun(manager)
        outbox = session.outbox
        await until(lambda: not manager.sessions)
        assert outbox is not None and isinstance(outbox.outcome, Refusal) and session.job.session.closed
        assert outbox.outcome.code is grpc.StatusCode.INTERNAL

    running(pipeline, work)


def test_a_server_whose_engine_is_stuck_closes_and_its_sessions_end_later(
    pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sessions: list[Session] = []
    gates: list[Gate] = []
    engines: list[EngineThread] = []

    async def work(manager: SessionManager) -> None:
        resting = await begun(manager)
        await until(lambda: resting.delivered == 1)
        stuck = await begun(manager, credits=4)
        gates.append(held(stuck.job))
        await until(gates[0].reached.is_set)
        sessions.extend((resting.job.session, stuck.job.session))
        engines.append(manager.engine)

    running(pipeline, work)
    assert engines[0].alive
    gates[0].open.set()
    assert engines[0].stop(60) and all(session.closed for session in sessions)
    assert "the engine's thread ended" not in caplog.messages


def test_a_second_signal_ends_a_server_whose_engine_is_stuck(pipeline: Any) -> None:
    async def run() -> None:
        server = Server(pipeline, ServerConfig(port=0, grace=600))
        await server.start()
        gate = held((await begun(server.manager, credits=4)).job)
        await until(gate.reached.is_set)
        for _ in range(2):
            server._signalled()
            await asyncio.sleep(0.1)
        await until(server._drained.is_set)
        gate.open.set()

    asyncio.run(run())


def test_a_chunk_that_cannot_be_packed_ends_its_session(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(manager: SessionManager) -> None:
        session = await begun(manager)
        outbox = session.outbox
        assert outbox is not None
        await until(lambda: not manager.sessions)
        assert isinstance(outbox.outcome, Refusal) and outbox.outcome.code is grpc.StatusCode.INTERNAL

    make = Session.__next__

    def wrong(self: Session) -> Any:
        chunk = make(self)
        chunk.timings["decode"] = "long"  # type: ignore[assignment]
        return chunk

    monkeypatch.setattr(Session, "__next__", wrong)
    running(pipeline, work)


def indices(folder: Path) -> list[int]:
    """Of whole snapshots; fails where there is a part of one."""
    names = sorted(path.name.split(".", 1)[1] for path in folder.iterdir())
    if names:
        index = names[0].split(".")[0]
        assert names == [f"{index}.chunks", f"{index}.session", "json"]
        return [int(index)]
    return []


MOMENTS = {"taking": (Session, "snapshot"), "packing": (ServedSession, "pack"), "writing": (Snapshot, "save")}


@pytest.mark.parametrize("end", [stop, give_up, drained])
@pytest.mark.parametrize(
    "moment", ["taking", "packing", "writing", "taking the last one", "writing the last one"]
)
def test_the_snapshot_of_a_session_that_ends_meanwhile_is_whole_or_not_left_behind(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: End, moment: str
) -> None:
    """The one before stays where the session can be taken up; the one that was being written is finished."""
    folder = tmp_path / "s"
    gate = Gate()
    what = MOMENTS[moment.split()[0]]
    newest = 2 if moment.startswith("writing") else 1
    left = [] if end is stop else [newest]
    calls, work = itertools.count(), getattr(*what)

    def slow(*arguments: Any) -> Any:
        if next(calls):  # but for the first chunk
            gate()
        return work(*arguments)

    monkeypatch.setattr(*what, slow)

    async def run(manager: SessionManager) -> None:
        assert manager.recovery is not None
        session = await begun(manager)
        await until(lambda: session.stored)
        last = None
        if moment.endswith("last one"):
            monkeypatch.setattr(session.job, "snapshot", lambda count: None)
        session.credit(0)
        if moment.endswith("last one"):
            await until(lambda: session.delivered == 2)
            last = asyncio.create_task(manager.recovery.final(session, manager.loop.time() + 60))
        await until(gate.reached.is_set)
        if moment == "packing":
            await until(lambda: manager.engine.rests(session.job))
        end(manager, session)
        gate.open.set()
        await until(lambda: not manager.sessions)
        if last is not None:
            await last
        await manager.recovery.close()
        assert indices(folder) == left
        if left:
            stored = manager.recovery.store.find(token_hash(session.token))
            assert stored is not None
            assert [kept.index for kept in manager.recovery.store.chunks(stored)] == [newest - 1]

    running(pipeline, run, folder)


@pytest.mark.parametrize(
    ("end", "code"), [(stop, grpc.StatusCode.NOT_FOUND), (give_up, grpc.StatusCode.UNAVAILABLE)]
)
def test_a_session_whose_memory_is_not_free_yet_is_taken_up_later_where_a_snapshot_stays(
    pipeline: Any, tmp_path: Path, end: End, code: grpc.StatusCode
) -> None:
    async def run(manager: SessionManager) -> None:
        session = await begun(manager)
        await until(lambda: session.stored)
        other = await begun(manager, credits=4)
        gate = held(other.job)
        await until(gate.reached.is_set)
        end(manager, session)
        again = pb.Reattach(resume_token=session.token, next_chunk=1)
        with pytest.raises(Refusal) as caught:
            await reattach(manager, "ann", again, "test")
        assert caught.value.code is code
        gate.open.set()
        await until(lambda: session.id not in manager.sessions)
        if code is grpc.StatusCode.UNAVAILABLE:
            restored, _ = await reattach(manager, "ann", again, "test")
            assert restored.id == session.id and restored is not session

    running(pipeline, run, tmp_path / "s")


@pytest.mark.parametrize("restored", [False, True])
def test_a_session_that_comes_too_late_for_a_drain_is_not_closed_on_the_event_loop(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    gate, closed_in = Gate(), []
    make, close = Pipeline.session, Session.close

    def slow(*arguments: Any) -> Session:
        made = make(*arguments)
        gate()
        return made

    def noted(session: Session) -> None:
        closed_in.append(threading.current_thread())
        close(session)

    async def run(manager: SessionManager) -> None:
        token = ""
        if restored:
            session = await begun(manager)
            await until(lambda: session.stored)
            token = session.token
            give_up(manager, session)
            await until(lambda: not manager.sessions)
        monkeypatch.setattr(Pipeline, "session", slow)
        monkeypatch.setattr(Session, "close", noted)
        again = pb.Reattach(resume_token=token, next_chunk=1)
        work = asyncio.create_task(reattach(manager, "ann", again, "test") if restored else begun(manager))
        await until(gate.reached.is_set)
        manager.draining = True
        gate.open.set()
        with pytest.raises(Refusal) as caught:
            await work
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert len(closed_in) == 1 and closed_in[0] is not threading.main_thread()

    running(pipeline, run, tmp_path / "s")
