from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from swiftvideo.runtime import (
    AnchorSettings,
    BridgeSettings,
    EngineError,
    Geometry,
    Pipeline,
    PolicySettings,
    Prompt,
    WindowSettings,
)
from swiftvideo.runtime.memory import switch_strength, window_frames
from tests.runtime.watch import Run, Shifted, turned

PLAIN = WindowSettings(enabled=False)
SWIFT = PolicySettings(window=PLAIN)


@pytest.fixture(scope="module")
def prompts(pipeline: Pipeline, texts: tuple[str, ...]) -> tuple[Prompt, Prompt]:
    return pipeline.encode(texts[0]), pipeline.encode(texts[1])


def started(pipeline: Pipeline, prompt: Prompt, chunks: int = 5, **settings: Any) -> Run:
    run = Run(pipeline.engine, prompt, dataclasses.replace(SWIFT, **settings))
    run.chunks(chunks)
    return run


# -- window and strength -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since", "ahead", "frames"),
    [
        (0, None, 12),
        (3, None, 11),
        (9, None, 10),
        (36, None, 8),
        (90, None, 7),
        (90, 9, 9),
        (90, 3, 11),
        (90, 1, 11),
        (90, 0, 12),
    ],
)
def test_the_window_shrinks_after_a_switch_and_grows_before_one(
    since: int, ahead: int | None, frames: int
) -> None:
    g = Geometry(2, 2, 12, 16, 8, 8, 16, 32)
    upcoming = None if ahead is None else 100 + ahead
    assert window_frames(WindowSettings(), g, 100, 100 - since, upcoming) == frames


@pytest.mark.parametrize(
    ("settings", "since", "ahead", "frames"),
    [
        (WindowSettings(enabled=False), 90, None, 12),
        (WindowSettings(min_size=9), 90, None, 9),
        (WindowSettings(min_size=1), 90, None, 4),  # never without one frame beyond the sink
        (WindowSettings(min_size=40), 90, None, 12),
        (WindowSettings(min_size=None), 90, None, 6),
        (WindowSettings(tau_post=90.0), 90, None, 9),
        (WindowSettings(tau_post=None), 12, None, 9),
        (WindowSettings(tau_post=0.0), 3, None, 7),
        (WindowSettings(tau_post=0.0), 0, None, 12),
        (WindowSettings(tau_pre=90.0), 900, 90, 9),
        (WindowSettings(tau_pre=None), 900, 6, 9),
        (WindowSettings(tau_pre=None), 900, 15, 7),
        (WindowSettings(tau_pre=0.0), 900, 3, 7),
    ],
)
def test_every_setting_of_the_window(
    settings: WindowSettings, since: int, ahead: int | None, frames: int
) -> None:
    g = Geometry(2, 2, 12, 16, 8, 8, 16, 32)
    assert window_frames(settings, g, 900, 900 - since, None if ahead is None else 900 + ahead) == frames


def test_half_of_a_small_window_is_too_little() -> None:
    g = Geometry(2, 2, 12, 16, 8, 8, 16, 32, window=5, sink=1)
    assert window_frames(WindowSettings(min_size=None), g, 900, 0, None) == 3


def test_the_window_limits_the_keys(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    run = Run(pipeline.engine, prompts[0], PolicySettings())
    steps = run.chunks(14)
    g, each = pipeline.geometry, pipeline.geometry.steps + 1
    assert steps[-1].window == 8 and steps[0].window == g.window
    for index, step in enumerate(steps):
        keys = min(step.window, (index + 1) * g.chunk) * g.frame_tokens
        assert {forward.keys for forward in run.forwards[each * index : each * (index + 1)]} == {keys}


@pytest.mark.parametrize(("angle", "rho"), [(0, 0), (60, 0.5), (90, 1), (180, 1)])
def test_strength_is_one_minus_the_cosine(angle: float, rho: float) -> None:
    turn = np.radians(angle)
    old = np.array([[3, 0], [0, 2]], np.float32)
    new = np.array([[np.cos(turn), np.sin(turn)], [np.sin(turn) * 5, np.cos(turn) * 5]], np.float32)
    np.testing.assert_allclose(switch_strength(old, new), [rho, rho], atol=1e-6)
    np.testing.assert_array_equal(switch_strength(np.zeros((1, 2), np.float32), old[:1]), [1])


def test_only_norms_below_a_millionth_are_raised_to_it() -> None:
    old, new = np.array([[1, 0]], np.float32), np.array([[1, 1]], np.float32)
    assert switch_strength(old * np.float32(1e-5), new * np.float32(1e-5)) == pytest.approx(1 - 0.5**0.5)
    assert switch_strength(old * np.float32(1e-7), old) == pytest.approx(0.9)
    assert switch_strength(old, old * np.float32(1e-7)) == pytest.approx(0.9)


def test_strength_is_compared_as_it_is_not_rounded_to_float32() -> None:
    old, new = np.array([[1, 0]], np.float32), np.array([[24, 7]], np.float32)
    assert 0.04 <= switch_strength(old, new)[0] < 0.04 + 1e-15  # in float32 it is below 0.04


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_prompt_whose_signature_is_not_finite_is_refused(pipeline: Pipeline, value: float) -> None:
    """Any prompt, a video's first too: there is no switch whose strength would tell."""
    g = pipeline.geometry
    with pytest.raises(EngineError, match="signature is not finite"):
        pipeline.engine.condition(np.full((1, g.text_len, g.text_dim), value, np.float32))


# -- what each policy does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "mode", "recached"),
    [
        (0.0, "bridge-only", 0),
        (0.69, "bridge-only", 0),
        (0.71, "bridge+micro-recache", 3),
        (0.79, "bridge+micro-recache", 3),
        (0.81, "full-recache", 12),
        (1.0, "full-recache", 12),
    ],
)
def test_swift_chooses_by_strength(
    pipeline: Pipeline, prompts: tuple[Prompt, ...], rho: float, mode: str, recached: int
) -> None:
    run = started(pipeline, prompts[0])
    step = run.switch(turned(prompts[0], prompts[1], rho))
    g = pipeline.geometry
    start = 5 * g.chunk
    assert step.switch.mode == mode and step.switch.frame == start
    assert step.switch.rho == pytest.approx(rho, abs=1e-6) and step.switch.strength == step.switch.rho
    before = run.forwards[: -(g.steps + 1)]
    assert [(f.start, f.frames, f.step, f.force_sink) for f in before] == (
        [(start - recached, recached, g.steps, False)] if recached else []
    )
    # The anchor is taken under the old prompt before anything is written, and shown after any recache.
    names = run.tensors.names()
    assert names.count("inject") == 1 and names[0] == "inject"
    chunk = run.forwards[-1]
    assert chunk.keys == g.window * g.frame_tokens and run.cache.anchors == 1
    assert run.cache.has_bridge == (mode != "full-recache")
    shown = sum(n for a, n in run.tensors.named("denoise")[-1][4].tolist() if n and a < g.memory_rows)
    assert shown == (1 if mode == "full-recache" else 3)
    if recached:
        _, _, _, _, segments, prompt = run.tensors.named("denoise")[0]
        assert prompt.text == prompts[1].text  # the recache already reads the new prompt
        rows = 2 if mode != "full-recache" else 0  # the new bridge is seen, the new anchor is not yet
        memory_rows = [(a, n) for a, n in segments.tolist() if n and a < g.memory_rows]
        assert sum(n for _, n in memory_rows) == rows


def test_a_full_recache_sees_the_anchors_and_no_longer_the_bridge(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    run = started(pipeline, prompts[0])
    bridged = turned(prompts[0], prompts[1], 0.3)
    run.switch(bridged)
    assert run.cache.has_bridge
    run.switch(turned(bridged, prompts[0], 0.9))
    recache = run.tensors.named("denoise")[0][4]
    rows = {row for a, n in recache.tolist() for row in range(a, a + n)}
    assert rows & set(range(pipeline.geometry.memory_rows)) == {2}  # the anchor of the first switch


@pytest.mark.parametrize(
    ("low", "high", "mode"),
    [(1.0, 1.0, "full-recache"), (1.0, 2.0, "bridge+micro-recache"), (1.1, 2.0, "bridge-only")],
)
def test_a_strength_that_equals_a_threshold_reaches_it(
    pipeline: Pipeline, prompts: tuple[Prompt, ...], low: float, high: float, mode: str
) -> None:
    run = started(pipeline, prompts[0], 2, bridge=BridgeSettings(tau_low=low, tau_high=high))
    opposite = dataclasses.replace(prompts[1], signature=-prompts[0].signature)
    switch = run.switch(opposite).switch
    assert (switch.mode, switch.strength) == (mode, 1.0)


def test_memory_rows_are_keys_in_place_of_the_oldest_tokens(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    run = started(pipeline, prompts[0])
    run.switch(turned(prompts[0], prompts[1], 0.3))
    segments = run.tensors.named("denoise")[0][4]
    g = pipeline.geometry
    rows = np.concatenate([np.arange(a, a + n) for a, n in segments.tolist() if n])
    assert len(rows) == len(set(rows)) == g.window * g.frame_tokens
    assert set(rows[rows < g.memory_rows]) == {0, 1, 2}  # both tokens of the bridge and one anchor
    sink = g.memory_rows + np.arange(g.sink * g.frame_tokens)
    fresh = g.rows + np.arange(g.chunk * g.frame_tokens)
    assert set(sink) <= set(rows) and set(fresh) <= set(rows)


def test_keep_changes_only_the_text(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    run = started(pipeline, prompts[0], policy="keep", positions="absolute")
    k, v = run.rows()
    state = run.cache.state()
    run.rollout.ask(prompts[1])
    run.tensors.calls.clear()
    switch, _ = run.rollout._take_over(run.rollout.frame)
    assert switch is not None and (switch.mode, switch.strength) == ("keep", 1.0)
    assert run.rollout.prompt is prompts[1]
    assert run.cache.state() == state and not run.tensors.calls
    for before, after in zip((k, v), run.rows(), strict=True):
        np.testing.assert_array_equal(before, after)
    run.chunks(1)
    assert all(call[5] is prompts[1] for call in run.tensors.named("denoise"))
    assert run.cache.anchors == 0 and not run.cache.has_bridge
    assert run.rollout.segment == 15


def test_cut_forgets_everything(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    run = started(pipeline, prompts[0], policy="cut")
    step = run.switch(prompts[1])
    g = pipeline.geometry
    tokens = g.chunk * g.frame_tokens
    assert (step.switch.mode, step.switch.strength) == ("cut", 1.0) and not run.tensors.named("inject")
    assert [f.keys for f in run.forwards] == [tokens] * (g.steps + 1)
    assert (run.cache.base, run.cache.local_end) == (15 * g.frame_tokens, tokens)
    # Nothing of the first prompt's frames is left: another past gives the same chunk.
    other = Run(
        pipeline.engine, turned(prompts[1], prompts[0], 0.5), dataclasses.replace(SWIFT, policy="cut")
    )
    other.rollout.noise = Shifted(5, run.rollout.noise, before=99)
    other.chunks(5)
    np.testing.assert_array_equal(other.switch(prompts[1]).latents, step.latents)
    assert [s.window for s in run.chunks(4)] == [g.window] * 4


def test_recache_always_runs_the_whole_window_again(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    run = started(pipeline, prompts[0], policy="recache")
    emitted = run.rollout.emitted
    step = run.switch(turned(prompts[0], prompts[1], 0.0))
    g = pipeline.geometry
    assert step.switch.mode == "full-recache" and step.switch.strength == 1.0 and step.switch.rho < 1e-6
    first = run.forwards[0]
    assert (first.start, first.frames, first.step, first.keys) == (
        15 - g.window,
        g.window,
        g.steps,
        g.window * g.frame_tokens,
    )
    assert not run.tensors.named("inject") and run.cache.anchors == 0 and not run.cache.has_bridge
    loaded = run.tensors.named("load")[0][0]
    np.testing.assert_array_equal(loaded, emitted)
    np.testing.assert_array_equal(
        run.rollout.emitted, np.concatenate((emitted, step.latents), 1)[:, -g.window :]
    )


def test_a_switch_before_the_first_chunk_finds_nothing_to_remember(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    plain = Run(pipeline.engine, prompts[1], SWIFT).chunks(1)[0].latents
    for policy, rho in (
        ("swift", 0.3),
        ("swift", 0.75),
        ("swift", 0.9),
        ("recache", 0.9),
        ("keep", 0.9),
        ("cut", 0.9),
    ):
        run = Run(pipeline.engine, prompts[0], dataclasses.replace(SWIFT, policy=policy))
        run.switch(turned(prompts[0], prompts[1], rho))
        np.testing.assert_array_equal(run.rollout.emitted, plain)
        assert run.cache.anchors == 0 and not run.cache.has_bridge


def test_policies_other_than_swift_look_back_over_the_whole_window(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    for policy in ("recache", "keep", "cut"):
        run = Run(pipeline.engine, prompts[0], PolicySettings(policy=policy))  # type: ignore[arg-type]
        assert [step.window for step in run.chunks(3)] == [12] * 3
        assert run.memory.window(900, 0, None) == 12
    assert Run(pipeline.engine, prompts[0], PolicySettings()).memory.window(900, 0, None) == 7


# -- every setting -----------------------------------------------------------------------------------------------


def test_without_a_bridge_every_switch_is_a_full_recache(
    pipeline: Pipeline, prompts: tuple[Prompt, ...]
) -> None:
    never = BridgeSettings(enabled=False, tau_low=2.0, tau_high=2.0)  # with a bridge
    run = started(pipeline, prompts[0], 2, bridge=never)
    step = run.switch(turned(prompts[0], prompts[1], 0.1))
    assert step.switch.mode == "full-recache" and run.cache.anchors == 1 and not run.cache.has_bridge
    assert run.forwards[0].frames == 6  # no more than there are


def test_thresholds_scale_and_micro_of_the_bridge(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    settings = BridgeSettings(tau_low=0.2, tau_high=0.4, scale=2.5, decay=1.0, micro=5)
    run = started(pipeline, prompts[0], bridge=settings)
    emitted = run.rollout.emitted
    step = run.switch(turned(prompts[0], prompts[1], 0.3))
    assert step.switch.mode == "bridge+micro-recache" and run.forwards[0].frames == 5
    np.testing.assert_array_equal(run.tensors.named("load")[0][0], emitted[:, -5:])
    assert run.memory.bridge is not None
    np.testing.assert_allclose(run.rows()[1][:, :, :2], run.memory.bridge * 2.5, rtol=1e-6)
    assert started(pipeline, prompts[0], 2, bridge=settings).switch(
        turned(prompts[0], prompts[1], 0.5)
    ).switch.mode == ("full-recache")


def test_a_bridge_fades_and_is_dropped(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    run = started(pipeline, prompts[0], 2, bridge=BridgeSettings(decay=0.05))
    run.switch(turned(prompts[0], prompts[1], 0.3))
    fresh = run.memory.bridge
    assert fresh is not None
    first = run.tensors.named("write_memory")[0]
    assert first[0] == 0
    np.testing.assert_array_equal(first[1], fresh)  # at full strength in the chunk of the switch
    np.testing.assert_allclose(run.rows()[1][:, :, :2], fresh * 0.05, rtol=1e-6)
    run.chunks(1)
    np.testing.assert_allclose(run.rows()[1][:, :, :2], fresh * 0.0025, rtol=1e-6)
    assert run.cache.has_bridge
    run.chunks(1)
    assert not run.cache.has_bridge and run.memory.bridge is None  # 0.000125 < 0.001


def test_recent_frames_mix_and_scale_of_memories(pipeline: Pipeline, prompts: tuple[Prompt, ...]) -> None:
    g = pipeline.geometry
    for bridge_recent, anchor_recent, expected in ((2, 6, 6), (4, None, 3), (1, 2, 2)):
        run = started(
            pipeline,
            prompts[0],
            bridge=BridgeSettings(recent=bridge_recent),
            anchors=AnchorSettings(recent=anchor_recent, mix=0.6, scale=0.5),
        )
        run.switch(turned(prompts[0], prompts[1], 0.3))
        spans, old, new, rho, mix = run.tensors.named("inject")[0]
        assert spans[2, :, 1].sum() == bridge_recent * g.frame_tokens
        assert spans[4, :, 1].sum() == expected * g.frame_tokens
        assert mix == 0.6 and rho == pytest.approx(0.3, abs=1e-6)
        np.testing.assert_array_equal(old, prompts[0].signature)
        assert not np.array_equal(new, old)
        np.testing.assert_allclose(run.rows()[1][:, :, 2:3], run.memory.anchors[0] * 0.5, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 2])
def test_the_newest_anchors_are_kept(pipeline: Pipeline, prompts: tuple[Prompt, ...], most: int) -> None:
    run = started(pipeline, prompts[0], 2, anchors=AnchorSettings(max=most))
    made = []
    for number in range(3):
        run.switch(turned(prompts[number % 2], prompts[1 - number % 2], 0.2 if number else 0.9))
        made.append(run.memory.anchors[-1])
    assert run.cache.anchors == most
    np.testing.assert_array_equal(np.concatenate(run.memory.anchors), np.concatenate(made[-most:]))
    rows = run.rows()[1][:, :, 2 : 2 + most]
    np.testing.assert_allclose(rows, np.concatenate(made[-most:], 2) * 0.8, rtol=1e-6)


@pytest.mark.parametrize("anchors", [AnchorSettings(enabled=False), AnchorSettings(max=0)])
def test_anchors_can_be_switched_off(
    pipeline: Pipeline, prompts: tuple[Prompt, ...], anchors: AnchorSettings
) -> None:
    run = started(pipeline, prompts[0], 2, anchors=anchors)
    run.switch(turned(prompts[0], prompts[1], 0.9))
    assert run.cache.anchors == 0 and not run.tensors.named("inject")
    run.switch(turned(run.rollout.prompt, prompts[0], 0.3))
    assert run.cache.anchors == 0 and run.cache.has_bridge


@pytest.mark.parametrize("global_sink", [True, False])
def test_only_without_a_global_sink_a_recache_replaces_it(
    pipeline: Pipeline, prompts: tuple[Prompt, ...], global_sink: bool
) -> None:
    run = started(pipeline, prompts[0], global_sink=global_sink)
    g = pipeline.geometry
    sink = slice(g.memory_rows, g.memory_rows + g.sink * g.frame_tokens)
    before = run.rows()[1][:, :, sink]
    run.switch(turned(prompts[0], prompts[1], 0.9))
    assert run.forwards[0].force_sink == (not global_sink)
    assert np.array_equal(run.rows()[1][:, :, sink], before) == global_sink
