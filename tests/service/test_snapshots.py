"""What a server that dies may lose: never more than a snapshot's interval, however slow the disk is."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime import Session
from swiftvideo.runtime.errors import SwiftVideoError
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.server import Server
from swiftvideo.sdk.server.store import Store

from .harness import serving

EVERY = 3


def config(folder: Path) -> ServerConfig:
    return ServerConfig(port=0, snapshots=folder, snapshot_chunks=EVERY)


def test_no_chunk_is_made_that_is_too_far_from_the_newest_snapshot(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    write = Store.write

    def slow(*arguments: Any) -> None:
        assert go.wait(60)
        write(*arguments)

    monkeypatch.setattr(Store, "write", slow)

    def talk(server: Server, address: str) -> None:
        with Client(address) as client, client.generate("w1", credits=16, linger=60) as video:
            for _ in range(EVERY):
                next(video)
            (session,) = server.manager.sessions.values()
            time.sleep(0.5)
            assert (session.delivered, session.saved) == (EVERY, 0)
            go.set()
            for _ in range(2 * EVERY):
                next(video)
            assert session.saved >= 2 * EVERY

    serving(pipeline, config(tmp_path / "snapshots"), talk)


@pytest.mark.parametrize("where", ["the engine's file", "the rest"])
def test_a_full_disk_costs_the_snapshots_and_not_the_session(
    where: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SwiftVideoError("no space left") if where == "the engine's file" else OSError("no space left")

    if where == "the engine's file":
        monkeypatch.setattr(Session, "save", full)
    else:
        monkeypatch.setattr(Store, "write", full)

    def talk(server: Server, address: str) -> None:
        with Client(address) as client, client.generate("w1", chunks=3 * EVERY, linger=60) as video:
            assert len(list(video)) == 3 * EVERY

    server = serving(pipeline, config(tmp_path / "snapshots"), talk)
    assert server.metrics.registry.get_sample_value("swiftvideo_snapshots_total") == 0
