"""Chunks bear the client's name of their prompt, in whatever order prompts take over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from swiftvideo.sdk.client import Client

from .faults import written
from .harness import ServerProcess

CHUNKS = 8
AT = 5
"""Chunk of the prompt that is known ahead, and so asked for first."""


@pytest.mark.parametrize("killed", [None, 1, 3], ids=["uncut", "before the switches", "between them"])
def test_one_that_was_asked_for_later_and_takes_over_sooner_takes_no_name_away(
    small_bundle: Path, tmp_path: Path, killed: int | None
) -> None:
    folder = tmp_path / "s"
    arguments = ("--snapshots", str(folder), "--snapshot-chunks", "1", "--max-load", "0")
    servers = [ServerProcess(small_bundle, *arguments)]
    names = []
    try:
        with Client(servers[0].address, timeout=120) as client:
            with client.generate(
                "w1 w2", 3, prompts=[("w8 w9", AT)], credits=1, linger=60, chunks=CHUNKS
            ) as video:
                (ahead,) = video.state.prompts
                for chunk in video:
                    names.append(chunk.prompt_id)
                    if chunk.index == 0:
                        sooner, between = video.prompt("w20 w21"), video.prompt("w30", at_chunk=4)
                    if chunk.index == killed:
                        asyncio.run(written(folder, 1))
                        servers[0].kill()
                        servers.append(ServerProcess(small_bundle, *arguments, port=servers[0].port))
                state = video.state
        assert killed is None or any("session restored" in line for line in servers[1].log)
    finally:
        for server in servers:
            server.__exit__()
    first = state.applied[sooner]
    assert state.applied == {sooner: first, between: 4, ahead: AT} and first in (1, 2)
    assert names == [""] * first + [sooner] * (4 - first) + [between] + [ahead] * (CHUNKS - AT)
