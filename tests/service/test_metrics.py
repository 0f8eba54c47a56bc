"""What the metrics say: of latencies, of prompts, of the health."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.metrics import SECONDS, Metrics
from swiftvideo.sdk.server.server import Server

from .harness import ServerProcess, serving


def quantile(share: float, ends: Sequence[float], counts: Sequence[float]) -> float:
    """As histogram_quantile of Prometheus: between the ends of the bucket, in proportion."""
    rank = share * counts[-1]
    index = next(index for index, count in enumerate(counts) if count >= rank)
    if index == len(ends):
        return ends[-1]
    below, before = (0.0, 0.0) if index == 0 else (ends[index - 1], counts[index - 1])
    return below + (ends[index] - below) * (rank - before) / (counts[index] - before)


@pytest.mark.parametrize("latency", [0.021, 0.043, 0.08, 0.12, 0.26, 0.34, 0.51, 0.7, 0.9, 1.1, 2.0])
def test_a_quantile_is_near_the_latency_of_a_chunk(latency: float) -> None:
    counts = [float(latency <= end) for end in (*SECONDS, float("inf"))]
    for share in (0.5, 0.99):
        assert quantile(share, SECONDS, counts) == pytest.approx(latency, rel=0.5)
    assert quantile(0.5, SECONDS, counts) == pytest.approx(latency, rel=0.26)


def test_what_the_watchdog_allows_is_within_the_buckets() -> None:
    assert SECONDS[-1] >= ServerConfig().watchdog > SECONDS[-2]
    assert list(SECONDS) == sorted(set(SECONDS))


def test_a_prompt_for_a_later_chunk_is_no_latency_of_the_server(server: ServerProcess) -> None:
    """One prompt of each kind: of the start, for a later chunk, and for the next one."""
    before = server.metrics()
    with Client(server.address) as client, client.generate("w1", prompts=[("w2", 3)], credits=1) as video:
        next(video)
        video.prompt("w3", at_chunk=8)
        while next(video).index < 8:
            pass
        video.prompt("w4")
        while not next(video).mode:
            pass
    server.idle()
    after = server.metrics()
    grown = {name: value - before[name] for name, value in after.items()}
    assert sum(grown[name] for name in grown if name.startswith("swiftvideo_switches_total")) == 3
    assert grown["swiftvideo_switch_seconds_count"] == 1


def test_the_metrics_tell_the_health(pipeline: Any) -> None:
    def told(metrics: Metrics) -> float | None:
        return metrics.registry.get_sample_value("swiftvideo_serving")

    def talk(server: Server, _: str) -> None:
        assert told(server.metrics) == 1
        server.manager.loop.call_soon_threadsafe(server._set_health, False)
        patience = time.monotonic() + 20
        while told(server.metrics) and time.monotonic() < patience:
            time.sleep(0.01)
        assert told(server.metrics) == 0

    assert told(Metrics()) == 0
    serving(pipeline, ServerConfig(port=0), talk)
