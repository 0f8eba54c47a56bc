"""What a server does by itself: it warms up, looks after its engine, tokens and snapshots, and says how it is."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from prometheus_client import CollectorRegistry, generate_latest

from swiftvideo.sdk import aio
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.remote import AuthenticationError, BusyError
from swiftvideo.sdk.server import health, metrics, server as serving_module
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.drain import drain
from swiftvideo.sdk.server.recovery import Recovery
from swiftvideo.sdk.server.server import OPTIONS, Server
from swiftvideo.sdk.server.session import token_hash
from swiftvideo.v1 import generation_pb2 as pb

from .harness import METHOD, CuttingProxy, serving, start
from .test_access import CLIENT, OPERATOR, write_tokens

EVERY = 4


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def http(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_what_is_compiled_for_the_first_two_chunks_does_not_count_as_a_chunks_time() -> None:
    """With the torch engine on a GPU that is a minute, and no second session was let in until it was averaged away."""
    seconds = iter((0.4, 0.4, 0.0))
    session = map(time.sleep, seconds)
    pipeline = SimpleNamespace(words=(), session=lambda prompt: nullcontext(session))
    assert serving_module._warm_up(pipeline) < 0.2  # type: ignore[arg-type]
    assert list(seconds) == []


def test_the_second_session_of_a_new_server_is_refused_where_the_engine_has_no_time(pipeline: Any) -> None:
    def talk(server: Server, address: str) -> None:
        assert server.manager.admission.chunk_seconds > 0
        server.manager.admission.period = server.manager.admission.chunk_seconds * 1.5
        with Client(address) as client, client.generate("w1", linger=0) as first:
            next(first)
            with pytest.raises(BusyError, match="of its time"), client.generate("w1") as second:
                next(second)
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
                call = channel.stream_stream(METHOD + "Generate", pb.GenerateRequest.SerializeToString)
                list(call(iter([start("w1")]), timeout=20))
        trailers = dict(caught.value.trailing_metadata())
        details = Status.FromString(trailers["grpc-status-details-bin"])
        assert (details.code, details.message) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
            caught.value.details(),
        )
        info, retry = ErrorInfo(), RetryInfo()
        assert details.details[0].Unpack(info) and details.details[1].Unpack(retry)
        assert (info.reason, info.domain) == ("LOAD", "swiftvideo.v1")
        assert retry.retry_delay.ToMilliseconds() == int(trailers["retry-after-ms"])

    serving(pipeline, ServerConfig(port=0), talk)


def test_the_engine_is_looked_after_also_where_snapshots_are_not(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def broken(self: Recovery) -> None:
        looks.append(self)
        raise OSError("stale file handle")

    monkeypatch.setattr(serving_module, "BEAT", 0.02)
    monkeypatch.setattr(serving_module, "EXPIRE", 2)

    def talk(server: Server, address: str) -> None:
        monkeypatch.setattr(Recovery, "expire", broken)
        shutil.rmtree(tmp_path / "s")
        wait_for(lambda: len(looks) > 2)
        server.manager.engine._running_since = time.monotonic() - 100
        server.manager.engine._running = object()  # type: ignore[assignment]
        wait_for(lambda: http(server.metrics_port, "/healthz")[0] == 503)
        server.manager.engine._running = None
        wait_for(lambda: http(server.metrics_port, "/healthz")[0] == 200)

    serving(pipeline, ServerConfig(port=0, metrics_port=0, snapshots=tmp_path / "s"), talk)


def test_a_folder_that_went_away_costs_the_snapshots_and_is_counted(pipeline: Any, tmp_path: Path) -> None:
    def talk(server: Server, address: str) -> None:
        shutil.rmtree(tmp_path / "s")
        assert server.manager.recovery is not None
        server.manager.recovery.expire()
        with Client(address) as client, client.generate("w1", credits=1, linger=60) as video:
            for failures in (1, 2):
                for _ in range(EVERY):
                    next(video)
                wait_for(lambda: server.metrics.snapshot_failures._value.get() == failures)  # noqa: B023

    running = serving(pipeline, ServerConfig(port=0, snapshots=tmp_path / "s", snapshot_chunks=EVERY), talk)
    value = running.metrics.registry.get_sample_value
    assert (value("swiftvideo_snapshots_total"), value("swiftvideo_snapshot_failures_total")) == (0, 2)


def test_snapshots_take_no_more_than_they_may(pipeline: Any, tmp_path: Path) -> None:
    config = ServerConfig(port=0, snapshots=tmp_path / "s", snapshot_chunks=1, snapshot_space=1e-9)

    def talk(server: Server, address: str) -> None:
        with Client(address) as client, client.generate("w1", chunks=6, credits=1, linger=60) as video:
            next(video)
            (session,) = server.manager.sessions.values()
            wait_for(lambda: session.stored)
            assert len(list(video)) == 5

    running = serving(pipeline, config, talk)
    value = running.metrics.registry.get_sample_value
    assert (value("swiftvideo_snapshots_total"), value("swiftvideo_snapshot_failures_total")) == (1, 5)


def test_a_paused_session_keeps_its_snapshot_and_the_drain_makes_a_last_one(
    pipeline: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    config = ServerConfig(port=0, snapshots=folder, snapshot_chunks=EVERY, grace=0.2)

    def talk(server: Server, address: str) -> None:
        assert server.manager.recovery is not None
        with Client(address) as client, client.generate("w1", credits=1, linger=60) as video:
            for _ in range(EVERY + 2):
                next(video)
            (session,) = server.manager.sessions.values()
            video.pause()
            wait_for(lambda: session.paused and session.stored)
            for path in folder.iterdir():
                os.utime(path, (0, 0))
            server.manager.recovery.expire()
            wait_for(server.manager.recovery._expiring.done)
            assert len(list(folder.iterdir())) == 3
            wait_for(lambda: session.delivered == session.job.next_chunk)
            server.manager.loop.call_soon_threadsafe(server._signalled)
            wait_for(lambda: session.over)
            stored = server.manager.recovery.store.find(token_hash(session.token))
            assert stored is not None and stored.index == session.delivered > EVERY
            wait_for(server._drained.is_set)

    serving(pipeline, config, talk)


def test_a_session_that_waits_is_saved_when_the_server_shuts_down(pipeline: Any, tmp_path: Path) -> None:
    config = ServerConfig(port=0, snapshots=tmp_path / "s", snapshot_chunks=100, grace=5)

    def talk(server: Server, address: str) -> None:
        with Client(address) as client:
            video = client.generate("w1", credits=1, linger=60)
            next(video)
            (session,) = server.manager.sessions.values()
            video._call.cancel()
            wait_for(lambda: session.outbox is None)
            server.manager.loop.call_soon_threadsafe(server._signalled)
            wait_for(server._drained.is_set, 4)
            assert session.stored and list((tmp_path / "s").glob("*.json"))

    serving(pipeline, config, talk)


def test_a_drain_that_fails_ends_the_server_all_the_same(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(serving_module, drain.__name__, broken)

    def talk(server: Server, address: str) -> None:
        server.manager.loop.call_soon_threadsafe(server._signalled)
        wait_for(server._drained.is_set)

    serving(pipeline, ServerConfig(port=0), talk)


def test_a_token_that_is_taken_away_or_expires_ends_its_sessions(pipeline: Any, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")

    def talk(server: Server, address: str) -> None:
        with Client(address, CLIENT) as client, Client(address, OPERATOR) as operator:
            with client.generate("w1", credits=1) as video, operator.generate("w1", credits=1) as other:
                next(video), next(other)
                tokens.write_text(f"ola operator {OPERATOR}\nann client {CLIENT} 2020-01-01T00:00:00\n")
                with pytest.raises(AuthenticationError, match="ann has no valid token any more"):
                    for _ in range(1000):
                        next(video)
                        time.sleep(0.01)
                next(other)

    serving(pipeline, ServerConfig(port=0, tokens=tokens, max_load=None), talk)


def test_a_connection_that_is_half_open_is_noticed(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = [
        (name, value // 20 if name.endswith(("time_ms", "timeout_ms")) else value) for name, value in OPTIONS
    ]
    monkeypatch.setattr(serving_module, "OPTIONS", quick)

    async def talk(server: Server) -> float:
        proxy = CuttingProxy(server.port)
        async with aio.Client(await proxy.start()) as client:
            video = client.generate("w1", credits=1, linger=60)
            await anext(video)
            (session,) = server.manager.sessions.values()
            proxy.swallow()
            begin = time.monotonic()
            await asyncio.to_thread(wait_for, lambda: session.outbox is None)
            taken = time.monotonic() - begin
        await proxy.close()
        return taken

    def talking(server: Server, address: str) -> None:
        assert asyncio.run(talk(server)) < 10

    serving(pipeline, ServerConfig(port=0), talking)


def test_few_calls_watch_the_health_and_those_that_end_make_room(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    monkeypatch.setattr(health, "WATCHERS", 2)

    def talk(server: Server, address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def watch(name: str = "") -> Any:
                call = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60)
                next(call)
                return call

            first, _ = watch(), watch("nothing")
            with pytest.raises(grpc.RpcError) as caught:
                watch()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
            wait_for(lambda: server._health._watching == 1)
            watch()

    serving(pipeline, ServerConfig(port=0), talk)


def test_http_says_how_the_server_is_and_nothing_else(pipeline: Any) -> None:
    def talk(server: Server, address: str) -> None:
        port = server.metrics_port
        assert http(port, "/healthz") == (200, "serving\n")
        assert "swiftvideo_sessions" in http(port, "/metrics")[1]
        assert http(port, "/")[0] == http(port, "/metrics/x")[0] == 404
        server._serving = False
        assert http(port, "/healthz")[0] == 503
        server._serving = True

    serving(pipeline, ServerConfig(port=0, metrics_port=0, metrics_host="localhost"), talk)


def test_metrics_are_read_while_sessions_come_and_go(pipeline: Any) -> None:
    class Fake:
        closed = False

    def talk(server: Server, address: str) -> None:
        stop = threading.Event()
        manager = server.manager

        def come_and_go() -> None:
            while not stop.is_set():
                made = [Fake() for _ in range(200)]
                for one in made:
                    manager._caches.add(weakref.ref(one, manager._caches.discard))  # type: ignore[arg-type]

        thread = threading.Thread(target=come_and_go)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        thread.start()
        try:
            for _ in range(300):
                assert manager._open_caches() >= 0
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
        wait_for(lambda: manager._open_caches() == 0)

    serving(pipeline, ServerConfig(port=0), talk)


def test_what_a_gpu_cannot_tell_is_left_out_of_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotSupported(Exception):
        pass

    def refuse(_: Any) -> Any:
        raise NotSupported

    def handle(index: int) -> int:
        return refuse(index) if index == 2 else index

    fake = SimpleNamespace(
        NVMLError=NotSupported,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetMemoryInfo=lambda at: SimpleNamespace(used=100 + at),
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetUtilizationRates=lambda at: refuse(at) if at else SimpleNamespace(gpu=50),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    registry = CollectorRegistry()
    registry.register(metrics._Gpus())
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    assert lines == [
        'swiftvideo_gpu_memory_bytes{gpu="0"} 100.0',
        'swiftvideo_gpu_memory_bytes{gpu="1"} 101.0',
        'swiftvideo_gpu_utilisation_ratio{gpu="0"} 0.5',
    ]
