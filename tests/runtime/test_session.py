from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from swiftvideo.runtime import (
    Pipeline,
    PromptError,
    Session,
    UsageError,
    load,
)
from swiftvideo.runtime.telemetry import STAGES
from tests.runtime.watch import held

MODES = ("bridge-only", "bridge+micro-recache", "full-recache")


def test_chunks_count_up_and_fit_together(session: Session, texts: tuple[str, ...]) -> None:
    g = session.geometry
    shown = 0
    for number, chunk in zip(range(3), session, strict=False):
        frames = g.chunk * g.temporal_stride - (g.temporal_stride - 1 if number == 0 else 0)
        assert chunk.frames.shape == (frames, g.height, g.width, 3) and chunk.frames.dtype == np.uint8
        assert (chunk.index, chunk.start, chunk.first_frame) == (number, number * g.chunk, shown)
        assert (chunk.prompt, chunk.prompt_id, chunk.mode, chunk.rho) == (texts[0], 0, "", None)
        assert g.sink < chunk.window <= g.window
        assert chunk.latents.shape == (g.chunk, g.latent_channels, g.latent_height, g.latent_width)
        assert np.isfinite(chunk.latents).all() and chunk.latents.dtype == np.float32
        assert set(chunk.timings) == {"denoise", "commit", "decode"} < set(STAGES)
        assert all(seconds > 0 for seconds in chunk.timings.values())
        shown += frames
    assert session.frame == 3 * g.chunk


def test_a_chunk_stays_as_it_was_given(session: Session) -> None:
    first = next(session)
    latents, frames = first.latents.copy(), first.frames.copy()
    next(session)
    np.testing.assert_array_equal(first.latents, latents)
    np.testing.assert_array_equal(first.frames, frames)


def test_a_prompt_takes_effect_at_the_next_boundary(session: Session, texts: tuple[str, ...]) -> None:
    seen = []
    for chunk in session:
        seen.append((chunk.prompt, chunk.prompt_id, bool(chunk.mode)))
        if chunk.index == 1:
            assert session.prompt(texts[1]) == 1
        if chunk.index == 3:
            break
    assert seen == [
        (texts[0], 0, False),
        (texts[0], 0, False),
        (texts[1], 1, True),
        (texts[1], 1, False),
    ]


def test_a_switch_is_reported(session: Session, texts: tuple[str, ...]) -> None:
    next(session)
    session.prompt(texts[1])
    chunk = next(session)
    assert chunk.mode in MODES and chunk.window == session.geometry.window
    assert type(chunk.rho) is float and 0 <= chunk.rho <= 1
    assert "inject" in chunk.timings and ("recache" in chunk.timings) == (chunk.mode != "bridge-only")


def test_a_new_prompt_changes_the_video(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    with pipeline.session(texts[0], 7) as same, pipeline.session(texts[0], 7) as other:
        np.testing.assert_array_equal(next(same).latents, next(other).latents)
        other.prompt(texts[1])
        assert np.abs(next(same).latents - next(other).latents).max() > 1e-3


def test_of_two_prompts_before_a_boundary_the_second_waits_for_the_next(
    session: Session, texts: tuple[str, ...]
) -> None:
    next(session)
    assert [session.prompt(texts[1]), session.prompt(texts[2])] == [1, 2]
    assert [
        (chunk.prompt_id, bool(chunk.mode)) for chunk in (next(session), next(session), next(session))
    ] == [
        (1, True),
        (2, True),
        (2, False),
    ]


def test_prompts_ahead_are_taken_in_the_order_of_their_frames(
    session: Session, texts: tuple[str, ...]
) -> None:
    g = session.geometry
    session.prompt(texts[2], at_frame=2 * g.chunk)
    session.prompt(texts[1], at_frame=g.chunk - 1)
    ids = [next(session).prompt_id for _ in range(4)]
    assert ids == [0, 2, 1, 1]


def test_a_known_switch_widens_the_window_before_it(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    g = pipeline.geometry
    with pipeline.session(texts[0], 7) as plain, pipeline.session(texts[0], 7) as told:
        told.prompt(texts[1], at_frame=12 * g.chunk)
        windows = [(next(plain).window, next(told).window) for _ in range(12)]
    before, last = windows[:6], windows[-1]
    assert all(a <= b for a, b in windows) and last[0] < last[1]
    assert before[0][0] == before[0][1] == g.window


def test_a_frame_of_the_past_is_refused(session: Session, texts: tuple[str, ...]) -> None:
    next(session)
    c = session.geometry.chunk
    with pytest.raises(
        UsageError, match=rf"at_frame is {c - 1} and the next chunk starts at latent frame {c}: ask"
    ):
        session.prompt(texts[1], at_frame=c - 1)
    with pytest.raises(UsageError, match="at_frame is -1"):
        session.prompt(texts[1], at_frame=-1)
    assert session.prompt(texts[1], at_frame=c) == 1


@pytest.mark.parametrize("frame", [30.5, float("nan"), float("inf"), "30"])
def test_a_frame_that_is_no_whole_number_is_refused(
    session: Session, texts: tuple[str, ...], frame: Any
) -> None:
    with pytest.raises(UsageError, match=r"at_frame is .*a whole number of latent frames is needed"):
        session.prompt(texts[1], at_frame=frame)
    assert session.prompt(texts[1]) == 1
    assert next(session).prompt_id == 1


def test_a_frame_may_be_of_any_integer_type(session: Session, texts: tuple[str, ...], tmp_path: Path) -> None:
    session.prompt(texts[1], at_frame=np.int64(session.geometry.chunk))
    session.save(tmp_path / "x")
    assert [next(session).prompt_id for _ in range(2)] == [0, 1]


def test_while_a_chunk_is_made_the_next_boundary_is_its_end(
    session: Session, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = session.geometry.chunk
    session.prompt(texts[1], at_frame=c)
    asked: list[int] = []

    def ask() -> bool:
        if not asked:  # within the first chunk
            with pytest.raises(
                UsageError, match=rf"at_frame is {c - 1} and the next chunk starts at latent frame {c}"
            ):
                session.prompt(texts[2], at_frame=c - 1)
            asked.append(session.prompt(texts[2]))
        return False

    session.interrupt = ask
    assert [next(session).prompt_id for _ in range(4)] == [0, 1, 2, 2] and asked == [2]


@pytest.mark.parametrize("text", ["", "  ", "a purple-ish zebra", "red " * 300, 5])
def test_a_bad_prompt_leaves_the_session_as_it_was(
    session: Session, texts: tuple[str, ...], text: Any
) -> None:
    next(session)
    with pytest.raises(PromptError, match=r"the prompt|this model does not know"):
        session.prompt(text)
    chunk = next(session)
    assert chunk.prompt_id == 0 and not chunk.mode
    assert session.prompt(texts[1]) == 1


# -- threads -----------------------------------------------------------------------------------------------------


def test_prompts_from_other_threads_never_wait_for_a_chunk(
    session: Session, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = held(session, monkeypatch)
    made: list[Any] = []
    worker = threading.Thread(target=lambda: made.extend(next(session) for _ in range(3)))
    worker.start()
    assert inside.wait(60)
    numbers: list[int] = []
    askers = [threading.Thread(target=lambda: numbers.append(session.prompt(texts[1]))) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
    assert sorted(numbers) == [1, 2] and not made  # both came back while the first chunk was being made
    go_on.set()
    worker.join(60)
    assert [chunk.prompt_id for chunk in made] == [0, 1, 2]


def test_many_threads_may_prompt_while_chunks_are_made(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    numbers: list[int] = []
    with pipeline.session(texts[0], policy="keep") as session:
        prompt = pipeline.encode(texts[1])

        def ask() -> None:
            for _ in range(50):
                numbers.append(session.prompt(prompt))
                time.sleep(0.0005)

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        ids = [next(session).prompt_id for _ in range(4)]
        for asker in askers:
            asker.join(60)
        ids += [next(session).prompt_id for _ in range(2)]
    assert sorted(numbers) == list(range(1, 201))
    assert ids == sorted(ids) and ids[-2:] == [ids[-3] + 1, ids[-3] + 2]


# -- determinism -------------------------------------------------------------------------------------------------


def story(session: Session, texts: tuple[str, ...], chunks: int = 5) -> Iterator[Any]:
    for number in range(chunks):
        if number == 2:
            session.prompt(texts[1])
        yield next(session)


def test_the_same_seed_gives_the_same_video(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    with pipeline.session(texts[0], 7) as session:
        alone = [chunk.frames for chunk in story(session, texts)]
    with pipeline.session(texts[0], 7) as one, pipeline.session(texts[2], 8) as two:
        mixed = []
        for a, b in zip(story(one, texts), story(two, (texts[2], texts[0])), strict=True):
            mixed.append(a.frames)
            assert not np.array_equal(a.frames, b.frames)
    for a, b in zip(alone, mixed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_gives_another_video(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    with pipeline.session(texts[0], 7) as one, pipeline.session(texts[0], 2**63 + 7) as two:
        assert np.abs(next(one).latents - next(two).latents).max() > 0.1


def test_the_number_of_threads_changes_next_to_nothing(
    pipeline: Pipeline, tiny_bundle: Path, texts: tuple[str, ...]
) -> None:
    with load(tiny_bundle, threads=2) as two:
        with pipeline.session(texts[0], 7) as a, two.session(texts[0], 7) as b:
            for left, right in zip(story(a, texts, 4), story(b, texts, 4), strict=True):
                np.testing.assert_allclose(left.latents, right.latents, atol=1e-3)
                assert np.abs(left.frames.astype(int) - right.frames).max() <= 2


# -- memory ------------------------------------------------------------------------------------------------------


def test_sixty_chunks_need_no_more_memory(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    process = psutil.Process()
    arrays: list[Any] = []
    with pipeline.session(texts[0], 7) as session:

        def run(chunks: int) -> None:
            for _ in range(chunks):
                chunk = next(session)
                arrays.extend(weakref.ref(item.base) for item in (chunk.frames, chunk.latents))
                if chunk.index % 6 == 5:
                    session.prompt(texts[chunk.index // 6 % 3])

        run(14)
        tracemalloc.start()
        run(6)
        gc.collect()
        python, resident = tracemalloc.get_traced_memory()[0], process.memory_info().rss
        run(60)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - python
        tracemalloc.stop()
        resident = process.memory_info().rss - resident
        alive = sum(array() is not None for array in arrays)
    chunk_bytes = session.geometry.chunk * 4 * session.geometry.height * session.geometry.width * 3
    assert alive <= 2, f"arrays of {alive} chunks are still there"  # those of the last chunk, at most
    assert grown < 2 * chunk_bytes, f"{grown} more bytes are in use by Python"
    assert resident < 10 * chunk_bytes, f"{resident} more bytes are resident"


def test_a_closed_session_frees_its_memory(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    prompt = pipeline.encode(texts[0])
    pipeline.session(prompt).close()
    tracemalloc.start()
    closed = []
    for _ in range(5):
        closed.append(pipeline.session(prompt))
        size = tracemalloc.get_traced_memory()[0]
        closed[-1].close()
    gc.collect()
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert left < size / 4


def test_a_session_and_its_prompts_are_gone_without_a_collection(
    pipeline: Pipeline, texts: tuple[str, ...]
) -> None:
    class Owner:
        """Holds the session that asks it, as a service does."""

        def __init__(self, session: Session) -> None:
            self.session, self.asked = session, 0
            session.interrupt = self.interrupt

        def interrupt(self) -> bool:
            self.asked += 1
            return False

    gc.collect()
    gc.disable()
    try:
        owner = Owner(pipeline.session(texts[0]))
        prompts = [pipeline.encode(texts[1]), pipeline.encode(texts[2])]
        for number, prompt in enumerate(prompts):
            owner.session.prompt(prompt, at_frame=3000 * number)
        next(owner.session)
        assert owner.asked > 0
        left = [weakref.ref(item) for item in (owner.session, owner.session._rollout, owner)]
        pending = [item.prompt for item in owner.session._rollout.pending]
        assert pending
        owner.session.close()
        arrays = [weakref.ref(item.signature) for item in prompts]
        del owner, prompts, prompt, pending
        dropped = pipeline.session(texts[0])
        next(dropped)
        left.append(weakref.ref(dropped))
        del dropped
        assert [item() for item in (*left, *arrays)] == [None] * 6
    finally:
        gc.enable()


# -- files -------------------------------------------------------------------------------------------------------


def test_a_saved_session_is_its_owners_alone_and_lies_where_a_link_leads(
    session: Session, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    umask = os.umask(0o022)
    try:
        session.save(tmp_path / "link")
    finally:
        os.umask(umask)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 2


def test_a_session_is_not_saved_over_what_is_no_file(session: Session, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"pipe' is a pipe or a device: give a file's name"):
        session.save(tmp_path / "pipe")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_a_session_knows_how_many_prompts_it_was_asked(session: Session, texts: tuple[str, ...]) -> None:
    assert session.asked == 1 and session.prompt(texts[1]) == 1 and session.asked == 2


def test_what_waits_is_told_as_it_is_at_that_moment(session: Session, texts: tuple[str, ...]) -> None:
    """A prompt from another thread does not change what is being saved."""
    session.prompt(texts[1])
    asked, waiting = session._rollout.waiting()
    session.prompt(texts[2])
    assert asked == 2 and [item.prompt.text for item in waiting] == [texts[1]]
