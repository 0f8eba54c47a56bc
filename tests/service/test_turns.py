"""Whose chunk comes next, and which prompts it knows: sessions that take as long as the test says, by its own clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from swiftvideo.sdk.server import engine as engine_module
from swiftvideo.sdk.server.engine import EngineThread, Job, Made


class FakeSession:
    """Chunks that are nothing but an index. work: done for each, in the engine's thread."""

    geometry = SimpleNamespace(chunk=3)

    def __init__(self, work: Callable[[int], object] = lambda index: None) -> None:
        self.work = work
        self.index = 0
        self.told: list[tuple[Any, int]] = []
        """Prompts, and the chunk before which the session heard them."""
        self.closed_in = ""
        """Name of the thread."""

    def __next__(self) -> Any:
        self.work(self.index)
        self.index += 1
        return SimpleNamespace(index=self.index - 1)

    def prompt(self, prompt: Any, at_frame: int | None) -> None:
        self.told.append((prompt, self.index))

    def close(self) -> None:
        self.closed_in = threading.current_thread().name


class Collected:
    """What a job was made to, and a way to wait for it."""

    def __init__(self) -> None:
        self.made: list[Made] = []
        self._condition = threading.Condition()

    def __call__(self, made: Made) -> None:
        with self._condition:
            self.made.append(made)
            self._condition.notify_all()

    def wait(self, count: int) -> list[Made]:
        """The first `count`."""
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.made) >= count, 60)
        return self.made


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Stage:
    """An engine's thread, its jobs by name, and the order of their chunks. A chunk takes ten seconds and plays one."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.engine = EngineThread()
        self.order: list[str] = []
        self.jobs: dict[str, Job] = {}
        self.done: dict[str, Collected] = {}

    def add(self, name: str, work: Callable[[int], object] = lambda index: None) -> None:
        def make(index: int) -> None:
            self.clock.now += 10
            self.order.append(name)
            work(index)

        self.done[name] = Collected()
        self.jobs[name] = Job(FakeSession(make), self.done[name], period=1.0)  # type: ignore[arg-type]
        self.engine.add(self.jobs[name])

    def allow(self, name: str, limit: int) -> None:
        self.engine.update(self.jobs[name], limit=limit, held=False)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Stage()
    monkeypatch.setattr(engine_module, "time", made.clock)
    yield made
    assert made.engine.stop(60)


def test_a_session_that_fell_far_behind_takes_turns_with_one_that_comes_later(stage: Stage) -> None:
    def work(index: int) -> None:
        if index == 4:
            stage.allow("later", 4)

    stage.add("behind", work)
    stage.add("later")
    stage.allow("behind", 12)
    stage.done["behind"].wait(12)
    stage.done["later"].wait(4)
    assert stage.order == ["behind"] * 5 + ["later", "behind"] * 4 + ["behind"] * 3


def test_a_session_that_had_no_credit_for_long_does_not_go_before_one_that_waited(stage: Stage) -> None:
    def work(index: int) -> None:
        stage.allow("waiting", 2)
        stage.clock.now += 5
        stage.allow("idle", 2)

    stage.add("idle")
    stage.add("waiting")
    stage.add("busy", work)
    for name in ("idle", "waiting", "busy"):
        stage.allow(name, 1)
        stage.done[name].wait(1)
    stage.done["idle"].wait(2)
    stage.done["waiting"].wait(2)
    assert stage.order == ["idle", "waiting", "busy", "waiting", "idle"]


def test_a_prompt_is_heard_when_it_was_promised_also_behind_one_that_waits(stage: Stage) -> None:
    stage.add("a")
    job = stage.jobs["a"]
    promised = [
        (text, stage.engine.ask(job, text, 0, heard)[1])  # type: ignore[arg-type]
        for text, heard in (("first", 0), ("resumed", 3), ("live", 0), ("last", 4))
    ]
    assert promised == [("first", 0), ("resumed", 3), ("live", 3), ("last", 4)]
    stage.allow("a", 6)
    stage.done["a"].wait(6)
    assert job.session.told == promised  # type: ignore[attr-defined]
