"""The scenarios of `make soak`, small: what must hold at any scale. Times are measured there, not asserted here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from . import faults, load, scenarios
from .harness import ServerProcess

FREE = ("--max-load", "0")


def test_cancels_at_any_moment_leave_nothing_behind(server: ServerProcess) -> None:
    found = asyncio.run(scenarios.cancels(server, 28))
    assert found["after_cancel"] <= 1, "the engine went on for more than the denoise step that ran"
    assert found["sessions"] == found["caches"] == 0
    assert max(found["growth"][name] for name in ("tasks", "threads", "descriptors")) <= 0


def test_prompts_are_applied_once_in_order_and_at_the_next_chunk(server: ServerProcess) -> None:
    found = asyncio.run(scenarios.switches(server, 200, sessions=4))
    assert found == {"switches": 200, "problems": 0, "examples": []}


def test_a_session_that_was_cut_has_the_bytes_of_one_that_was_not(
    server: ServerProcess, pipeline: Any
) -> None:
    found = asyncio.run(scenarios.cuts(server, pipeline, 20, clients=2))
    assert found["cuts"] >= 20 and found["reconnects"] >= 10
    assert found["sessions_that_differ"] == 0


def test_killed_servers_sessions_go_on_from_their_snapshots(
    small_bundle: Path, pipeline: Any, tmp_path: Path
) -> None:
    found = asyncio.run(faults.kills(small_bundle, tmp_path / "snapshots", pipeline, rounds=1))
    assert found["sessions_that_differ"] == 0
    assert len(found["chunks_made_again"]) == 3, (
        "how many were made again hangs on the disk: `make soak` looks"
    )


def test_a_client_that_stops_reading_costs_its_credits_and_no_more(server: ServerProcess) -> None:
    found = asyncio.run(load.stalled(server, 20))
    assert found["credits_left"] == 0, "the stalled session did not use up its credits"
    assert found["rss_growth"] <= found["credits_bytes"] + faults.MEBIBYTE


def test_too_many_sessions_are_refused_with_a_hint(small_bundle: Path) -> None:
    with ServerProcess(small_bundle, *FREE, "--max-sessions", "2") as server:
        found = asyncio.run(load.overload(server, 2, 40))
    assert found["codes"] == ["RESOURCE_EXHAUSTED"]
    assert found["hints"] == found["rejects"]["count"] > 0


def test_sigterm_ends_sessions_between_chunks_and_the_process_with_zero(small_bundle: Path) -> None:
    with ServerProcess(small_bundle, *FREE, "--grace", "0.5") as server:
        found = asyncio.run(scenarios.sigterm(server, 3, 0.5))
    assert found["not_serving"] and found["exit_code"] == 0
    assert (found["broken_chunks"], found["ended"], found["reasons"]) == (0, 3, ["REASON_DRAINED"])


def test_hostile_messages_get_a_status_of_their_own_and_hurt_nobody(small_bundle: Path) -> None:
    with ServerProcess(small_bundle, *FREE, "--max-sessions", "64") as server:
        found = asyncio.run(faults.fuzz(server, 2000, 200))
    assert found["alive"] and found["not_allowed"] == 0, found["examples"]
    assert sum(found["codes"].values()) == 2200 and found["codes"]["INVALID_ARGUMENT"] > 500
    assert found["sessions"] == found["caches"] == 0


def test_churn_leaves_nothing_behind_and_a_planted_leak_is_seen(small_bundle: Path) -> None:
    with ServerProcess(small_bundle, *FREE) as server:
        found = asyncio.run(faults.churn(server, 6, samples=4))
    kept = ("descriptors", "threads", "tasks", "sessions", "caches")
    assert {name: found[f"{name}_growth"] for name in kept} == dict.fromkeys(kept, 0)
    with ServerProcess(small_bundle, *FREE, module="tests.service.leaky_server") as server:
        leaking = asyncio.run(faults.churn(server, 6, samples=4))
    assert any("descriptors" in text for text in faults.leaks(leaking))


@pytest.mark.parametrize("name", ["rss", "descriptors", "threads", "tasks", "sessions", "caches"])
def test_growth_of_anything_counts_as_a_leak(name: str) -> None:
    flat = dict.fromkeys(("rss", "descriptors", "threads", "tasks", "sessions", "caches"), 0.0)
    taken = [{**flat, name: number * 4e6} for number in range(8)]
    report = {**faults.growth(taken), "pid_alive": True}
    assert len(faults.leaks(report)) == 1 and name in faults.leaks(report)[0]
    assert faults.leaks({**faults.growth([flat] * 8), "pid_alive": False}) == ["the server died"]
