from __future__ import annotations

import dataclasses
from decimal import Decimal, getcontext
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from swiftvideo.runtime import Pipeline, PolicySettings, Prompt, WindowSettings, memory
from swiftvideo.runtime.positions import rotation, time_tables
from tests.runtime.watch import Run, Shifted, turned


@pytest.fixture(scope="module")
def prompts(pipeline: Pipeline, texts: tuple[str, ...]) -> tuple[Prompt, Prompt]:
    return pipeline.encode(texts[0]), pipeline.encode(texts[1])


@pytest.mark.parametrize("start", [0, 12, 10_000_000])
def test_tables_are_exact_for_frames_of_any_index(start: int) -> None:
    getcontext().prec = 60
    turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    cos, sin = time_tables(start, 3, 4)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == (3, 4)
    for frame in range(3):
        for pair in range(4):
            angle = float((start + frame) * Decimal(10000) ** (Decimal(-pair) / 4) % turn)
            assert cos[frame, pair] == pytest.approx(np.cos(angle), abs=2e-7)
            assert sin[frame, pair] == pytest.approx(np.sin(angle), abs=2e-7)


def test_a_rotation_moves_a_frame_forward() -> None:
    cos, sin = rotation(7, 22)
    assert cos.dtype == np.float64
    (from_cos,), (from_sin,) = time_tables(5, 1, 22)
    (to_cos,), (to_sin,) = time_tables(12, 1, 22)
    np.testing.assert_allclose(from_cos * cos - from_sin * sin, to_cos, atol=2e-7)
    np.testing.assert_allclose(from_cos * sin + from_sin * cos, to_sin, atol=2e-7)


def test_windowed_equals_absolute_while_the_sink_is_within_the_window(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    runs = [Run(pipeline.engine, prompts[0], PolicySettings(positions=p)) for p in ("windowed", "absolute")]  # type: ignore[arg-type]
    for run in runs:
        run.rollout.ask(turned(prompts[0], prompts[1], 0.3), 6)
    for index in range(6):
        windowed, absolute = (run.chunks(1)[0].latents for run in runs)
        difference = float(np.abs(windowed - absolute).max())
        assert difference < 1e-4 if index < 4 else difference > 1e-4, index
        assert bool(runs[0].tensors.named("place_sink")) == (index >= 4)
    # Frame 17 looks back to frame 6: there the sink stands now, its time pairs turned by six frames.
    g = pipeline.geometry
    sink = slice(g.memory_rows, g.memory_rows + g.sink * g.frame_tokens)
    placed, plain = (run.rows()[0][:, :, sink] for run in runs)
    even, odd = slice(0, 2 * g.time_pairs, 2), slice(1, 2 * g.time_pairs, 2)
    turn = np.exp(6j * 10000.0 ** (-np.arange(g.time_pairs) / g.time_pairs))
    expected = (plain[..., even] + 1j * plain[..., odd]) * turn
    np.testing.assert_allclose(placed[..., even] + 1j * placed[..., odd], expected, atol=1e-5)
    np.testing.assert_array_equal(placed[..., 2 * g.time_pairs :], plain[..., 2 * g.time_pairs :])


def test_no_key_is_ever_further_than_the_window(
    pipeline: Pipeline, prompts: tuple[Prompt, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    monkeypatch.setattr(
        memory, "rotation", lambda frames, pairs: (turns.append(frames), rotation(frames, pairs))[1]
    )
    run = Run(
        pipeline.engine, prompts[0], PolicySettings(window=WindowSettings(enabled=False), global_sink=False)
    )
    g = pipeline.geometry
    sink = place = memories = 0
    for chunk in range(12):
        if chunk in (3, 5, 8):
            run.rollout.ask(turned(run.rollout.prompt, prompts[chunk % 2], 0.9 if chunk == 8 else 0.4))
        run.tensors.calls.clear()
        run.forwards.clear()
        turns.clear()
        run.chunks(1)
        offsets, forwards = iter(turns), iter(run.forwards)
        for name, arguments in run.tensors.calls:
            if name == "place_sink":
                place = next(offsets)
            elif name == "place_memory":
                memories = next(offsets)
            elif name == "write_memory":
                memories = 0
            elif name == "denoise":
                call = next(forwards)
                newest = call.start + call.frames - 1
                if chunk:
                    assert newest - (sink + place) < g.window and sink + place + g.sink - 1 <= newest
                    shown = [n for a, n in arguments[4].tolist() if n and a < g.memory_rows]
                    assert not shown or newest - memories < g.window
            elif name == "commit":
                for fresh, row, _ in arguments[0].tolist():
                    if row == g.memory_rows:
                        sink, place = call.start + fresh // g.frame_tokens, 0
    assert sink > 0  # the full recache moved it, and it was followed


def test_without_a_sink_there_is_none_to_place(pipeline: Pipeline) -> None:
    engine: Any = Mock()
    without = memory.Memory(engine, dataclasses.replace(pipeline.geometry, sink=0), PolicySettings())
    for start in range(0, 30, 3):
        without.begin(start, 3, 12)
        without.commit()
    assert engine.commit.called and not engine.place_sink.called


def test_a_cache_that_begins_at_frame_ten_million_behaves_the_same(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    g = pipeline.geometry
    first = 10_000_000 // g.chunk + 1
    near = Run(pipeline.engine, prompts[0], PolicySettings())
    far = Run(pipeline.engine, prompts[0], PolicySettings(), Shifted(first, near.rollout.noise))
    far.rollout.index, far.rollout.segment = first, first * g.chunk
    far.memory._clear(first * g.chunk)
    for run, offset in ((near, 0), (far, first * g.chunk)):
        run.rollout.ask(turned(prompts[0], prompts[1], 0.75), offset + 6)
        run.rollout.ask(turned(prompts[1], prompts[0], 0.9), offset + 15)
    for _ in range(7):
        a, b = near.chunks(1)[0], far.chunks(1)[0]
        assert (a.window, a.switch and a.switch.mode) == (b.window, b.switch and b.switch.mode)
        assert b.start - a.start == first * g.chunk
        np.testing.assert_allclose(b.latents, a.latents, atol=1e-4)
    assert far.cache.local_end == near.cache.local_end
