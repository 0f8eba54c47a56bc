"""Keepalive of clients in other languages: the server takes what the protocol allows, and a ban costs no session."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server import server as serving_module
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.server import OPTIONS, Server
from swiftvideo.v1 import generation_pb2 as pb

from .harness import METHOD, serving, start
from .peers import ACK, DATA, GOAWAY, PING, Peer, frame
from .test_server import wait_for

INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
CALM = 11
"""HTTP/2's ENHANCE_YOUR_CALM (RFC 9113, 7)."""


def silent(port: int) -> tuple[Peer, pb.Started]:
    """A call whose client has taken chunk 0 and gives no credit, so that nothing is sent any more."""
    peer = Peer(port, window=1 << 24)
    message = start(credits=1, linger_ms=60_000, encoding=pb.ENCODING_JPEG).SerializeToString()
    peer.call(METHOD + "Generate")
    peer.send(frame(DATA, 0, 1, b"\0" + len(message).to_bytes(4, "big") + message))

    def came() -> list[pb.GenerateResponse]:
        data = b"".join(payload for kind, _, _, payload in list(peer.frames) if kind == DATA)
        found = []
        while len(data) >= 5 and len(data) >= (size := 5 + int.from_bytes(data[1:5], "big")):
            found.append(pb.GenerateResponse.FromString(data[5:size]))
            data = data[size:]
        return found

    wait_for(lambda: len(came()) == 2)
    return peer, came()[0].started


def pong(peer: Peer, number: int) -> bool:
    """Whether a ping was answered."""
    return any(
        kind == PING and flags & ACK and payload == number.to_bytes(8, "big")
        for kind, flags, _, payload in list(peer.frames)
    )


def test_pings_are_answered_unless_they_come_too_often(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dict(OPTIONS)[INTERVAL] == 5_000, "which generation.proto says"
    monkeypatch.setattr(serving_module, "OPTIONS", tuple((dict(OPTIONS) | {INTERVAL: 200}).items()))

    def talk(server: Server, address: str) -> None:
        peer, started = silent(server.port)
        for number in range(8):
            peer.send(frame(PING, 0, 0, number.to_bytes(8, "big")))
            wait_for(lambda number=number: pong(peer, number))  # type: ignore[misc]
            time.sleep(0.3)  # after the answer: on a busy machine two could be read at once
        assert all(kind != GOAWAY for kind, *_ in peer.frames)
        with contextlib.suppress(OSError):  # it closes while they are sent
            peer.send(frame(PING, 0, 0, bytes(8)) * 20)
        assert peer.closed()
        (said,) = [payload for kind, _, _, payload in peer.frames if kind == GOAWAY]
        assert int.from_bytes(said[4:8], "big") == CALM and said[8:] == b"too_many_pings"
        with Client(address) as client, client.reattach(started.resume_token, 1) as video:
            assert next(video).index == 1
        peer.close()

    serving(pipeline, ServerConfig(port=0), talk)
