"""The engine's thread, admission, snapshots and the manager, without a network."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from swiftvideo.runtime.errors import (
    EngineError,
    IntegrityError,
    OutOfMemoryError,
    PromptError,
    SettingsError,
    StoppedError,
    SwiftVideoError,
)
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.remote import ServerError, UnavailableError
from swiftvideo.sdk.server import payload
from swiftvideo.sdk.server.admission import Admission
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.engine import EngineThread, Job, Made
from swiftvideo.sdk.server.manager import SessionManager
from swiftvideo.sdk.server.metrics import Metrics
from swiftvideo.sdk.server.outbox import Outbox
from swiftvideo.sdk.server.server import Server
from swiftvideo.sdk.server.status import TABLE, Refusal, refusal
from swiftvideo.v1 import generation_pb2 as pb

from .harness import serving
from .test_turns import Collected


def test_sessions_take_turns_and_none_goes_beyond_its_limit(pipeline: Any) -> None:
    engine = EngineThread()
    order: list[int] = []
    done: list[Collected] = []
    for number in range(3):
        collected = Collected()

        def took(made: Made, number: int = number, collected: Collected = collected) -> None:
            order.append(number)
            collected(made)

        job = Job(pipeline.session("w1", number), took, period=1.0)
        engine.add(job)
        done.append(collected)
        engine.update(job, limit=4, held=False)
    for collected in done:
        collected.wait(4)
    assert engine.stop(10)
    chunks = [[made.chunk.index for made in collected.made if made.chunk] for collected in done]
    assert chunks == [[0, 1, 2, 3]] * 3
    turns = [number for number in order if order.count(number)][: 4 * 3]
    assert all(turns[at : at + 3].count(number) <= 2 for at in range(0, 9, 3) for number in range(3))


def test_a_session_that_fails_ends_alone_with_its_error(pipeline: Any) -> None:
    engine = EngineThread()
    bad, good = Collected(), Collected()
    failing = pipeline.session("w1")

    def broken(*_: Any) -> None:
        raise EngineError("the graph failed: try again")

    failing._rollout.tensors.decode = broken
    jobs = [Job(failing, bad, 1.0), Job(pipeline.session("w1"), good, 1.0)]
    for job in jobs:
        engine.add(job)
        engine.update(job, limit=2, held=False)
    assert isinstance(bad.wait(1)[0].error, EngineError) and failing.closed
    assert [made.error for made in good.wait(2)] == [None, None]
    assert engine.alive and engine.stop(10)


def test_a_cancel_stops_a_chunk_within_one_run_of_the_backbone(pipeline: Any) -> None:
    engine = EngineThread()
    collected = Collected()
    session = pipeline.session("w1")
    inside, go = threading.Event(), threading.Event()
    denoise = session._rollout.tensors.denoise

    def slow(*arguments: Any) -> None:
        denoise(*arguments)
        inside.set()
        go.wait(30)

    session._rollout.tensors.denoise = slow
    job = Job(session, collected, 1.0)
    engine.add(job)
    engine.update(job, limit=1, held=False)
    assert inside.wait(30)
    engine.cancel(job)
    go.set()
    assert isinstance(collected.wait(1)[0].error, StoppedError)
    assert job.forwards_cancelled == 1 and job.forwards == 1 and session.closed
    engine.cancel(job)
    assert engine.stop(10) and len(collected.made) == 1


def test_a_session_that_ended_and_its_prompts_are_gone_without_a_collection(pipeline: Any) -> None:
    """A prompt on a GPU is 94 MB."""

    async def run() -> None:
        manager = SessionManager(pipeline, ServerConfig(), Metrics())
        session, outbox = await manager.start("ann", pb.Start(prompt="w1", credits=2), "test")
        session.paused = True  # so that the prompts wait
        session.refresh()
        await manager.prompt(session, pb.Prompt(id="a", text="w2"))
        await manager.prompt(session, pb.Prompt(id="b", text="w3", at_chunk=3000))
        (ask, ahead) = session.job.asks
        session.paused = False
        session.refresh()
        left = [weakref.ref(item) for item in (session, session.job, session.job.session)]
        left += [weakref.ref(item.prompt.signature) for item in (ask, ahead)]
        del ask, ahead
        while session.delivered < 2:
            await asyncio.sleep(0.01)
        manager.detach(session, outbox)
        del session, outbox
        async with asyncio.timeout(30):
            while manager.sessions or any(item() is not None for item in left):
                await asyncio.sleep(0.01)
        await manager.close()

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_a_crash_of_the_thread_tells_every_session(pipeline: Any) -> None:
    crashed: list[BaseException] = []
    engine = EngineThread(crashed.append)
    collected = [Collected(), Collected()]
    jobs = [Job(pipeline.session("w1"), one, 1.0) for one in collected]
    for job in jobs:
        engine.add(job)

    def bug(*_: Any) -> None:
        raise RuntimeError("a bug")

    engine._serve = bug  # type: ignore[method-assign]
    engine.update(jobs[0], limit=1, held=False)
    for one in collected:
        (made,) = one.wait(1)
        assert isinstance(made.error, EngineError) and "RuntimeError" in str(made.error)
    engine._thread.join(10)
    assert not engine.alive and len(crashed) == 1 and all(job.session.closed for job in jobs)


def test_a_crash_of_the_engine_ends_its_sessions_and_not_the_server(pipeline: Any) -> None:
    def talk(server: Server, address: str) -> None:
        with Client(address) as client:
            with client.generate("w1", linger=0) as video:
                next(video)

                def bug(*_: Any) -> None:
                    raise RuntimeError("a bug")

                server.manager.engine._serve = bug  # type: ignore[method-assign]
                with pytest.raises(ServerError, match="engine's thread ended"):
                    for _ in video:
                        pass
            with client.generate("w1", chunks=2) as again:
                assert len(list(again)) == 2

    server = serving(pipeline, ServerConfig(port=0), talk)
    assert server.metrics.registry.get_sample_value("swiftvideo_engine_crashes_total") == 1


def test_a_stuck_engine_is_said_to_be_and_recovers(pipeline: Any) -> None:
    go = threading.Event()

    def talk(server: Server, address: str) -> None:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        with Client(address) as client, grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def wait_for(status: int) -> None:
                while stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status != status:
                    time.sleep(0.05)

            with client.generate("w1", linger=0) as video:
                next(video)
                (session,) = server.manager.sessions.values()
                tensors = session.job.session._rollout.tensors
                decode = tensors.decode

                def slow(latents: Any) -> Any:
                    go.wait(60)
                    return decode(latents)

                tensors.decode = slow
                with pytest.raises(UnavailableError, match="stuck"):
                    for _ in video:
                        pass
            wait_for(health_pb2.HealthCheckResponse.NOT_SERVING)
            with (
                pytest.raises(UnavailableError, match="does not answer"),
                client.generate("w1", linger=0) as refused,
            ):
                next(refused)
            go.set()
            wait_for(health_pb2.HealthCheckResponse.SERVING)
            with client.generate("w1", chunks=1) as again:
                assert len(list(again)) == 1

    serving(pipeline, ServerConfig(port=0, watchdog=0.5), talk)


def test_late_chunks_are_noticed_once(pipeline: Any) -> None:
    def talk(server: Server, address: str) -> None:
        server.manager.admission.period = 1e-6
        with Client(address) as client, client.generate("w1", chunks=8) as video:
            list(video)
            kinds = [notice.kind for notice in video.state.notices]
            assert kinds == [pb.Notice.KIND_THROTTLED]

    serving(pipeline, ServerConfig(port=0), talk)


def test_admission_counts_sessions_the_engines_time_and_memory(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(max_sessions=3, max_sessions_per_client=2, tokens=Path("t"))
    admission = Admission(config, pipeline)
    admission.check("a", ["a", "b"], 4)
    for clients, reason in ((["a", "b", "c"], "sessions"), (["a", "a"], "client")):
        with pytest.raises(Refusal) as caught:
            admission.check("a", clients, 4)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and caught.value.reason == reason
        trailers = dict(caught.value.trailers)
        assert int(trailers["retry-after-ms"]) >= 500
    admission.measured(admission.period * 0.6)
    admission.check("a", [], 4)
    with pytest.raises(Refusal, match=r"would need 1\.20 of its time"):
        admission.check("a", ["b"], 4)
    monkeypatch.setattr("swiftvideo.sdk.server.admission.available_memory", lambda: config.memory_reserve)
    with pytest.raises(Refusal, match="MiB are free"):
        admission.check("a", [], 4)


def test_admission_counts_the_frames_that_credits_let_a_session_keep(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk for each credit, and the one in the making."""
    config = ServerConfig()
    admission = Admission(config, pipeline)
    with pipeline.session("w1") as session:
        cache = session._rollout.tensors._cache
        rows = cache.k.nbytes + cache.v.nbytes
        next(session)
        frames = next(session).frames.nbytes
    free = config.memory_reserve + rows + 5 * frames
    monkeypatch.setattr("swiftvideo.sdk.server.admission.available_memory", lambda: free)
    admission.check("a", [], 4)
    with pytest.raises(Refusal, match="MiB are free") as caught:
        admission.check("a", [], 5)
    assert caught.value.reason == "memory"


def test_admission_counts_those_frames_also_where_the_cache_is_on_a_gpu(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig()
    monkeypatch.setattr(type(pipeline.engine), "name", "torch")
    admission = Admission(config, pipeline)
    with pipeline.session("w1") as session:
        next(session)
        frames = next(session).frames.nbytes
    free = config.memory_reserve + 5 * frames
    monkeypatch.setattr("swiftvideo.sdk.server.admission.available_memory", lambda: free)
    admission.check("a", [], 4)
    with pytest.raises(Refusal, match="MiB are free"):
        admission.check("a", [], 5)


@pytest.mark.parametrize(
    "error,code",
    [
        (PromptError("x"), "INVALID_ARGUMENT"),
        (SettingsError("x"), "INVALID_ARGUMENT"),
        (OutOfMemoryError("x"), "RESOURCE_EXHAUSTED"),
        (EngineError("x"), "INTERNAL"),
        (IntegrityError("x"), "DATA_LOSS"),
        (KeyError("a secret"), "INTERNAL"),
    ],
)
def test_exceptions_have_their_status_and_foreign_ones_keep_their_text(error: Exception, code: str) -> None:
    found = refusal(error)
    assert found.code.name == code and "secret" not in found.text
    assert refusal(found) is found
    assert ("retry-after-ms" in dict(found.trailers)) == (code == "RESOURCE_EXHAUSTED")


def test_the_table_covers_every_exception_and_no_row_is_hidden() -> None:
    assert TABLE[-1][0] is SwiftVideoError
    for index, (kind, _) in enumerate(TABLE):
        assert not any(issubclass(kind, earlier) for earlier, _ in TABLE[:index]), kind


def test_an_outbox_gives_what_waits_and_then_the_end() -> None:
    async def run() -> None:
        outbox = Outbox()
        outbox.put(b"a")
        outbox.finish(pb.Ended(reason=pb.Ended.REASON_STOPPED))
        outbox.put(b"late")
        assert await outbox.get() == b"a"
        last = await outbox.get()
        assert (
            last is not None and pb.GenerateResponse.FromString(last).ended.reason == pb.Ended.REASON_STOPPED
        )
        assert await outbox.get() is None
        refused = Outbox()
        refused.put(b"a")
        refused.finish(Refusal(grpc.StatusCode.ABORTED, "x"))
        assert await refused.get() is None

    asyncio.run(run())


def test_unknown_encodings_are_refused() -> None:
    assert payload.checked(pb.ENCODING_UNSPECIFIED) == pb.ENCODING_RAW
    with pytest.raises(SettingsError, match="encoding is 9"):
        payload.checked(9)


def test_packing_is_the_same_in_any_thread_and_at_any_time() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 32, 3), np.uint8)
    for encoding in payload.encodings():
        first = payload.pack(frames, encoding, 12)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(payload.pack, frames, encoding, 12).result() == first
        assert len(first) == (6 if encoding == pb.ENCODING_JPEG else 1)
