"""What a peer without a token can hold: nothing for long, and never the server's own work."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.sdk import connection
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.remote import UnavailableError
from swiftvideo.sdk.server import endpoint, health, server as serving_module
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.server import OPTIONS, Server

from .harness import METHOD, ServerProcess, serving
from .peers import DATA, EMPTY, GOAWAY, HEADERS, HEALTH, PING, PREFACE, RESET, SETTINGS, Peer, frame, headers
from .test_access import CLIENT, make_pki, write_tokens
from .test_server import wait_for

HOLDING = {
    "nothing at all": lambda peer: None,
    "half a greeting": lambda peer: peer.send(PREFACE[:10]),
    "a greeting without settings": lambda peer: peer.send(PREFACE),
}
"""What a peer sends that never gets as far as HTTP/2."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets milliseconds of gRPC's options, by their names without "grpc." and "_ms"."""

    def change(**milliseconds: int) -> None:
        changed = dict(OPTIONS) | {f"grpc.{name}_ms": value for name, value in milliseconds.items()}
        assert len(changed) == len(OPTIONS), "an option that the server does not set"
        monkeypatch.setattr(serving_module, "OPTIONS", tuple(changed.items()))

    return change


@pytest.fixture
def guarded(tmp_path: Path) -> ServerConfig:
    """Tokens, and little time for a first message."""
    return ServerConfig(port=0, tokens=write_tokens(tmp_path / "tokens"), start_timeout=0.5, max_load=None)


@pytest.fixture
def connect() -> Iterator[Callable[..., Peer]]:
    """Makes peers, and closes them at the end."""
    made: list[Peer] = []

    def make(port: int, **settings: Any) -> Peer:
        made.append(Peer(port, **settings))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def answers(address: str) -> bool:
    """Whether a client that connects now is served, and not refused for too many connections."""
    with Client(address, CLIENT, timeout=20) as client:
        try:
            return bool(client.describe().engine)
        except UnavailableError as error:
            assert "too many connections" in str(error)
            return False


def stub(channel: Any) -> Any:
    return health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("sent", HOLDING)
def test_a_connection_that_never_begins_is_closed(
    pipeline: Any, quick: Callable[..., None], sent: str, connect: Callable[..., Peer]
) -> None:
    quick(server_handshake_timeout=300)

    def talk(server: Server, address: str) -> None:
        peer = connect(server.port, greet=False)
        HOLDING[sent](peer)
        assert peer.closed()

    serving(pipeline, ServerConfig(port=0), talk)


def test_a_tls_handshake_that_never_ends_is_ended(
    pipeline: Any, quick: Callable[..., None], tmp_path: Path, connect: Callable[..., Peer]
) -> None:
    quick(server_handshake_timeout=300)
    pki = make_pki(tmp_path / "pki")
    config = ServerConfig(port=0, certificate=pki.certificate, key=pki.key)

    def talk(server: Server, address: str) -> None:
        silent, half = connect(server.port, greet=False), connect(server.port, greet=False)
        half.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # the first bytes of a ClientHello
        assert silent.closed() and half.closed()

    serving(pipeline, config, talk)


def test_a_connection_without_calls_is_closed_and_clients_do_not_notice(
    pipeline: Any, quick: Callable[..., None], guarded: ServerConfig, connect: Callable[..., Peer]
) -> None:
    quick(max_connection_idle=300)

    def talk(server: Server, address: str) -> None:
        idle, half = connect(server.port), connect(server.port)
        half.send(frame(HEADERS, 0, 1, headers(METHOD + "Generate")))  # whose headers never end
        refused = connect(server.port)
        refused.call(METHOD + "Generate")
        with Client(address, CLIENT) as client:
            client.describe()
            assert idle.closed() and half.closed() and refused.closed() and refused.answered()
            client.describe()

    serving(pipeline, guarded, talk)


def test_a_connection_has_an_end_and_sessions_do_not_notice(
    pipeline: Any, quick: Callable[..., None], guarded: ServerConfig, connect: Callable[..., Peer]
) -> None:
    """A stranger keeps its connection busy, and one call without taking its answer; a session lasts longer."""
    quick(max_connection_age=1000, max_connection_idle=500)

    def talk(server: Server, address: str) -> None:
        with Client(address, CLIENT) as client, client.generate("w1 w2", credits=1) as video:
            next(video)
            (session,) = server.manager.sessions.values()
            outbox = session.outbox
            peer = connect(server.port, window=0)
            peer.call(HEALTH + "Check", 1, EMPTY)
            stream = 3
            while not peer.closed(0.1) and stream < 400:
                try:
                    peer.call(METHOD + "Describe", stream)
                except OSError:
                    break
                stream += 2
            assert peer.closed() and not any(kind == DATA for kind, *_ in peer.frames)
            assert any(kind == GOAWAY and b"max_age" in data for kind, _, _, data in peer.frames)
            next(video)
            client.describe()
            assert session.outbox is outbox is not None, "the call goes on, on its old connection"

    serving(pipeline, guarded, talk)


def test_further_connections_are_closed_and_those_that_end_make_room(
    pipeline: Any, guarded: ServerConfig, connect: Callable[..., Peer]
) -> None:
    config = ServerConfig(port=0, tokens=guarded.tokens, max_connections=3)

    def talk(server: Server, address: str) -> None:
        held = [connect(server.port), connect(server.port, greet=False), connect(server.port)]
        wait_for(lambda: all(any(kind == SETTINGS for kind, *_ in peer.frames) for peer in held))
        assert connect(server.port, greet=False).closed()
        held[1].close()
        wait_for(lambda: answers(address))  # the server may see that one comes before it sees that one went
        assert not held[0].closed(0) and not held[2].closed(0)

    serving(pipeline, config, talk)


@pytest.mark.parametrize("path", [METHOD + "Generate", METHOD + "Describe", "/no/thing", HEALTH[1:]])
def test_a_call_without_a_token_is_refused_before_its_message(
    pipeline: Any, guarded: ServerConfig, path: str, connect: Callable[..., Peer]
) -> None:
    patient = ServerConfig(port=0, tokens=guarded.tokens, start_timeout=1000.0)

    def talk(server: Server, address: str) -> None:
        peer = connect(server.port)
        peer.call(path)
        assert peer.answered()

    serving(pipeline, patient, talk)


@pytest.mark.parametrize(
    "path", [HEALTH + "Check", HEALTH + "List", HEALTH + "Watch", METHOD + "Describe", METHOD + "Generate"]
)
@pytest.mark.parametrize("body", [None, b"\0\0\0\0\7ab"], ids=["no message", "part of one"])
def test_a_call_whose_message_does_not_come_ends(
    pipeline: Any, path: str, body: bytes | None, connect: Callable[..., Peer]
) -> None:
    def talk(server: Server, address: str) -> None:
        peer = connect(server.port)
        peer.call(path)
        if body is not None:
            peer.send(frame(DATA, 0, 1, body))
        assert peer.answered()
        (status,) = [data for kind, _, stream, data in peer.frames if kind == HEADERS and stream == 1]
        assert b"no message came within 0.5 s" in status
        assert server.metrics.rejects.labels(reason="deadline_exceeded")._value.get() == 1

    serving(pipeline, ServerConfig(port=0, start_timeout=0.5), talk)


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("Check", b"\xff\xff", "INVALID_ARGUMENT"),
        ("Watch", b"\xff\xff", "INVALID_ARGUMENT"),
        ("List", b"\x08", "INVALID_ARGUMENT"),  # a message without fields: only a cut one is none
        ("Check", None, "FAILED_PRECONDITION"),
        ("Watch", None, "FAILED_PRECONDITION"),
        ("List", None, "FAILED_PRECONDITION"),
        ("Nothing", b"", "UNIMPLEMENTED"),
    ],
)
def test_no_call_of_a_stranger_is_in_the_log(
    server: ServerProcess, name: str, body: bytes | None, code: str, connect: Callable[..., Peer]
) -> None:
    """Not one that is wrong, and not one that breaks while it is answered."""
    before = len(server.log)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(HEALTH + name)(iter([] if body is None else [body]), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode[code]
    broken = connect(server.port, window=0)
    for stream in range(1, 11, 2):
        broken.call(HEALTH + name, stream, EMPTY)
        wait_for(lambda stream=stream: any(of == stream for _, _, of, _ in broken.frames))  # type: ignore[misc]
        broken.send(frame(RESET, 0, stream, b"\0\0\0\x08"))
    with Client(server.address) as client, client.generate("w1", chunks=1) as video:
        list(video)
    wait_for(lambda: any("session ended" in line for line in server.log[before:]))
    assert not [line for line in server.log[before:] if '"level": "info"' not in line]


def test_health_is_told_by_every_call(pipeline: Any) -> None:
    request, states = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    name = serving_module.NAME

    def talk(server: Server, address: str) -> None:
        loop = server.manager.loop
        with grpc.insecure_channel(address) as channel:
            ask = stub(channel)
            known, unknown = ask.Watch(request(service=name)), ask.Watch(request(service="nothing"))
            assert next(known).status == states.SERVING and next(unknown).status == states.SERVICE_UNKNOWN
            loop.call_soon_threadsafe(server._set_health, False)
            assert next(known).status == states.NOT_SERVING
            assert ask.Check(request()).status == ask.Check(request(service=name)).status
            assert ask.Check(request()).status == states.NOT_SERVING
            assert {
                service: one.status
                for service, one in ask.List(health_pb2.HealthListRequest()).statuses.items()
            } == dict.fromkeys(("", name), states.NOT_SERVING)
            with pytest.raises(grpc.RpcError, match="'nothing': use one of '', 'swiftvideo") as caught:
                ask.Check(request(service="nothing"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            loop.call_soon_threadsafe(server._set_health, True)
            assert next(known).status == states.SERVING
            known.cancel(), unknown.cancel()

    serving(pipeline, ServerConfig(port=0), talk)


def test_a_watcher_that_takes_no_answer_does_not_keep_the_server_from_ending(
    pipeline: Any, connect: Callable[..., Peer]
) -> None:
    def talk(server: Server, address: str) -> None:
        peer = connect(server.port, window=0)
        peer.call(HEALTH + "Watch", 1, EMPTY)
        wait_for(lambda: server._health._watching == 1)
        with grpc.insecure_channel(address) as channel:
            call = stub(channel).Watch(health_pb2.HealthCheckRequest())
            next(call)
            drained = asyncio.run_coroutine_threadsafe(server.drain(), server.manager.loop)
            assert next(call).status == health_pb2.HealthCheckResponse.NOT_SERVING
            drained.result(30)
        assert not any(kind == DATA for kind, *_ in peer.frames)

    serving(pipeline, ServerConfig(port=0, grace=0.0), talk)


def test_a_connection_may_not_send_more_and_more_ahead(pipeline: Any, connect: Callable[..., Peer]) -> None:
    """gRPC measures with pings how much a fast peer could send, and then lets it: megabytes, on every connection."""

    def talk(server: Server, address: str) -> None:
        peer = connect(server.port)
        for stream in (1, 3, 5):
            peer.call(HEALTH + "Check", stream, EMPTY)
            assert peer.answered(stream)
        assert not any(kind == PING for kind, *_ in peer.frames)
        settings = [data for kind, flags, _, data in peer.frames if kind == SETTINGS and not flags]
        windows = [value for data in settings for key, value in struct.iter_unpack(">HI", data) if key == 4]
        assert max(windows, default=65_535) <= 65_535

    serving(pipeline, ServerConfig(port=0), talk)


@pytest.mark.parametrize("body", [EMPTY, None], ids=["no answer is taken", "no message comes"])
def test_a_connection_has_few_calls_of_health_open(
    pipeline: Any, connect: Callable[..., Peer], body: bytes | None
) -> None:
    def talk(server: Server, address: str) -> None:
        peer = connect(server.port, window=0)
        streams = range(1, 2 * health.CALLS, 2)
        for stream in streams:
            peer.call(HEALTH + ("Check", "Watch")[stream % 4 > 1], stream, body)
        peer.call(HEALTH + "Check", 101, body)
        assert peer.answered(101) and not any(peer.answered(stream, 0.0) for stream in streams)
        (status,) = [data for kind, _, stream, data in peer.frames if kind == HEADERS and stream == 101]
        assert b"calls of health open" in status
        with grpc.insecure_channel(address) as channel:  # another connection
            stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        for stream in streams:
            peer.send(frame(RESET, 0, stream, b"\0\0\0\x08"))
        wait_for(lambda: not server._health._open and not server._health._watching)

    serving(pipeline, ServerConfig(port=0), talk)


def test_the_metrics_endpoint_has_few_connections_and_none_for_long(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "CONNECTIONS", 2)
    monkeypatch.setattr(endpoint, "SECONDS", 1.0)

    def talk(server: Server, address: str) -> None:
        slow = [socket.create_connection(("127.0.0.1", server.metrics_port)) for _ in range(2)]
        stop = threading.Event()

        def drip() -> None:  # each byte is in time
            while not stop.wait(0.05):
                try:
                    slow[0].sendall(b"G")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        wait_for(lambda: len(server._endpoint._server._begun) == 2)  # type: ignore[union-attr]
        with socket.create_connection(("127.0.0.1", server.metrics_port)) as further:
            further.settimeout(20)
            assert further.recv(1) == b""
        try:
            for connection in slow:
                connection.settimeout(20)
                assert connection.recv(1) == b""
        finally:
            stop.set()
            thread.join()
            for connection in slow:
                connection.close()
        wait_for(lambda: not server._endpoint._server._begun)  # type: ignore[union-attr]
        with socket.create_connection(("127.0.0.1", server.metrics_port)) as honest:
            honest.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert b"200 OK" in honest.recv(1000)

    serving(pipeline, ServerConfig(port=0, metrics_port=0), talk)


def test_settings_that_no_server_has_are_refused() -> None:
    for count in (0, 2_000_000):
        with pytest.raises(SettingsError, match=f"max_connections is {count}"):
            ServerConfig(max_connections=count)


def test_clients_end_an_idle_connection_before_the_server_does() -> None:
    """gRPC takes once or twice the time that is set, and says on stderr that a server ended a connection for it."""
    client, served = dict(connection.OPTIONS), dict(OPTIONS)
    assert 2 * client["grpc.client_idle_timeout_ms"] < served["grpc.max_connection_idle_ms"]
