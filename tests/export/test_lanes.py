"""Streams of the engine for GPUs, with what stands in for torch's."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from functools import partialmethod
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swiftvideo.export import cuda
from swiftvideo.export.lanes import Lane

from .rehearsal import engines


def test_all_sessions_share_two_streams_that_one_thread_uses_at_a_time() -> None:
    """torch has 32 streams in turn: with two for every session the 17th would write into the first one's graph."""
    _, engine = engines()
    a, b = engine.open(), engine.open()
    assert a.lane is b.lane is engine.lane and a.decoding is b.decoding is engine.decoding is not engine.lane
    sent: list[Any] = []
    other = Thread(target=lambda: sent.append(b.sent(np.ones(1))))
    with a.lane():
        other.start()
        other.join(0.2)
        assert not sent, "the other thread waits"
        a.sent(np.ones(1))
    other.join(10)
    assert len(sent) == 1


def test_lanes_begin_when_the_weights_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were copied in another stream, for which nothing that only decodes would wait."""
    done: list[Any] = []
    monkeypatch.setattr(cuda, "channels_last", lambda decoder: done.append("weights"))
    monkeypatch.setattr(Lane, "follow", partialmethod(lambda lane, made: made.append(lane), done))
    _, engine = engines()
    assert done == ["weights", engine.lane, engine.decoding]
    monkeypatch.undo()
    waited: list[Any] = []
    monkeypatch.setattr(engine.lane, "stream", SimpleNamespace(wait_stream=waited.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    engine.lane.follow()
    assert waited == ["the caller's"]


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And other threads' work stays out of the stream for that time."""
    lane, seen = Lane(torch.device("cpu")), []
    done = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(lane, "stream", SimpleNamespace(record_event=lambda: done))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **more: nullcontext())

    def work() -> None:
        other = Thread(target=lambda: seen.append(lane._held.acquire(blocking=False)))
        other.start()
        other.join()
        seen.append(gc.isenabled())

    assert lane.capture(work) == "replay"
    assert seen == [False, True] * 3 + [False, False] and gc.isenabled()


def test_who_waits_for_a_lane_leaves_it_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """But asks for what to wait for while nobody captures, which that would break."""
    lane, seen = Lane(torch.device("cpu")), []

    def free() -> None:
        other = Thread(target=lambda: seen.append(lane._held.acquire(blocking=False)))
        other.start()
        other.join()

    def record_event() -> Any:
        free()
        return SimpleNamespace(synchronize=free)

    monkeypatch.setattr(lane, "stream", SimpleNamespace(record_event=record_event))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    lane.wait()
    assert seen == [False, True]
