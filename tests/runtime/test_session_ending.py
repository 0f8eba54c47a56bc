"""How a session ends: closed, failed or interrupted, between two chunks and within one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime import ClosedError, EngineError, Pipeline, Session, StoppedError, UsageError
from tests.runtime.watch import held


def test_a_closed_session_refuses_everything(
    pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path
) -> None:
    with pipeline.session(texts[0]) as session:
        next(session)
        assert not session.closed
    assert session.closed
    session.close()
    for call in (
        lambda: next(session),
        lambda: session.prompt(texts[1]),
        lambda: session.save(tmp_path / "x"),
    ):
        with pytest.raises(
            ClosedError, match=r"this session was closed: open a new one with pipeline.session"
        ):
            call()
    assert not list(tmp_path.iterdir())


def test_a_failure_closes_the_session(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    next(session)

    def fail(*_: Any) -> None:
        raise EngineError("the engine failed")

    monkeypatch.setattr(session._rollout.tensors, "decode", fail)
    with pytest.raises(EngineError, match="the engine failed"):
        next(session)
    assert session.closed
    with pytest.raises(ClosedError):
        next(session)


def test_a_failure_is_told_before_that_of_closing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise EngineError("the engine failed")

    def fail_too() -> None:
        raise EngineError("its memory is lost")

    with monkeypatch.context() as patch:
        patch.setattr(session._rollout.tensors, "decode", fail)
        patch.setattr(session._rollout.tensors, "close", fail_too)
        with pytest.raises(EngineError, match="the engine failed") as caught:
            next(session)
    assert caught.value.__notes__ == ["then the session did not close: its memory is lost"]


@pytest.mark.parametrize("run", [1, 3])
def test_an_interrupt_gives_the_chunk_up_after_any_run(session: Session, run: int) -> None:
    asked: list[int] = []

    def interrupt() -> bool:
        asked.append(len(asked))
        return len(asked) == run

    session.interrupt = interrupt
    with pytest.raises(StoppedError, match="the chunk was given up"):
        next(session)
    assert len(asked) == run and session.closed


@pytest.mark.parametrize("moment", ["video_frames", "take"])
def test_an_interrupt_after_decoding_loses_no_chunk_unseen(
    session: Session, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    next(session)
    owner = type(session.geometry) if moment == "video_frames" else type(session._rollout.memory.clock)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, moment, interrupt)
        next(session)
    with pytest.raises(ClosedError):
        next(session)


def test_closing_within_a_chunk_takes_effect_at_its_end(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: Any = session._rollout.tensors
    closed = False

    def close(real: Any = tensors.close) -> None:
        nonlocal closed
        closed = True
        real()

    def within() -> bool:
        session.close()
        return closed

    monkeypatch.setattr(tensors, "close", close)
    session.interrupt = within
    assert next(session).index == 0 and closed
    with pytest.raises(ClosedError):
        next(session)


def test_a_session_that_is_closed_while_a_saving_fails_stays_closed(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        session.close()
        raise EngineError("the engine failed")

    monkeypatch.setattr(session._rollout.tensors, "export_state", fail)
    with pytest.raises(EngineError, match="the engine failed"):
        session.save(tmp_path / "x")
    assert session.closed
    with pytest.raises(ClosedError):
        next(session)


def test_a_chunk_within_a_chunk_is_refused(session: Session, tmp_path: Path) -> None:
    errors: list[UsageError] = []

    def within() -> bool:
        for call in (lambda: next(session), lambda: session.save(tmp_path / "x")):
            with pytest.raises(UsageError, match="is making a chunk: call next") as caught:
                call()
            errors.append(caught.value)
        return False

    session.interrupt = within
    assert next(session).index == 0 and errors
    session.interrupt = None
    assert next(session).index == 1 and not list(tmp_path.iterdir())


def test_closing_waits_for_the_chunk_that_is_made(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = held(session, monkeypatch)
    made: list[Any] = []
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            for chunk in session:
                made.append(chunk)
        except ClosedError as error:
            errors.append(error)

    worker = threading.Thread(target=guarded)
    worker.start()
    assert inside.wait(60)
    closer = threading.Thread(target=session.close)
    closer.start()
    while not session.closed:
        time.sleep(0.001)
    assert closer.is_alive()
    go_on.set()
    closer.join(60)
    worker.join(60)
    assert [chunk.index for chunk in made] == [0] and len(errors) == 1
    assert made[0].frames.shape[0] == 9
