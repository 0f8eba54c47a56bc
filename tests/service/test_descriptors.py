"""Connections take no more descriptors than leave the rest of a server its own."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from swiftvideo.sdk.server import descriptors
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.server import Server

from .harness import serving
from .peers import SETTINGS, Peer
from .test_server import wait_for

LIMIT = resource.RLIMIT_NOFILE


@pytest.mark.parametrize(
    ("limit", "wanted", "found"),
    [(1024, 512, 512), (256, 512, 96), (64, 512, 1), (resource.RLIM_INFINITY, 9000, 9000)],
)
def test_there_are_as_many_connections_as_there_are_files_for(
    limit: int, wanted: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert descriptors.connections(wanted) == found


def test_a_server_that_may_open_few_files_has_few_connections_and_says_so(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = resource.getrlimit(LIMIT)
    few = (descriptors.OTHERS + 2, real[1])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: few if kind == LIMIT else real)

    def talk(server: Server, address: str) -> None:
        held = [Peer(server.port) for _ in range(2)]
        try:
            wait_for(lambda: all(any(kind == SETTINGS for kind, *_ in peer.frames) for peer in held))
            held.append(Peer(server.port))
            assert held[2].closed()
            assert not held[0].closed(0) and not held[1].closed(0)
        finally:
            for peer in held:
                peer.close()

    serving(pipeline, ServerConfig(port=0), talk)
    assert "room for 2 connections and not for the 512 of max_connections: let it open 672 " in caplog.text
