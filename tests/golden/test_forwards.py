"""Single forwards from a recorded cache, and the units that they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swiftvideo.runtime.engine import Prompt
from swiftvideo.runtime.geometry import WindowSettings
from swiftvideo.runtime.memory import Memory, switch_strength, window_frames
from swiftvideo.runtime.rollout import Rollout

from .engines import NAMES, engine_of
from .replay import slots
from .scenario import FOLDER, SCENARIOS, Scenario
from .test_scenarios import close

every_engine = pytest.mark.parametrize("engine", NAMES)
pytestmark = pytest.mark.skipif(
    not (FOLDER / "single_chunk.npz").exists() or not (FOLDER / "units.npz").exists(),
    reason="this folder has scenarios only",
)


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """The recorded model in its usual sizes: single forwards were recorded with W 12, S 3, P 16."""
    return Scenario(FOLDER / "scn_b_bridge.npz" if (FOLDER / "scn_b_bridge.npz").exists() else SCENARIOS[0])


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name) as file:
        return {key: file[key] for key in file.files}


class Bench:
    """A rollout whose cache can be set, to run single forwards in."""

    def __init__(self, scenario: Scenario, engine: str, embeds: np.ndarray) -> None:
        self.engine = engine_of(scenario, engine)
        self.prompt: Prompt = self.engine.condition(embeds)
        self.rollout = Rollout(self.engine, scenario.settings, self.prompt, scenario)
        self.memory: Memory = self.rollout.memory
        self.passes = [*map(float, _times(scenario))]

    def fill(self, k: np.ndarray, v: np.ndarray, local_end: int, global_end: int) -> None:
        """Set the slots, given in the order of time."""
        g, cache = self.rollout.geometry, self.memory.cache
        cache.restore((g.frame_tokens, g.window, g.sink, g.max_anchors, 0, local_end, global_end, 0, 0))
        sink, ring = g.sink * g.frame_tokens, (g.window - g.sink) * g.frame_tokens
        recent = g.memory_rows + sink + (np.arange(global_end - local_end + sink, global_end) - sink) % ring
        rows = np.concatenate((g.memory_rows + np.arange(min(sink, local_end)), recent)).astype(int)
        state = self.rollout.tensors.export_state()
        for name, value in (("cache_k", k), ("cache_v", v)):
            state[name][:, :, rows] = value[:, :, : len(rows)]
        self.rollout.tensors.import_state(state)

    def remember(self, data: dict[str, np.ndarray]) -> None:
        """Install the recorded bridge and anchors."""
        self.rollout.tensors.write_memory(0, data["mem_bridge"] * data["mem_bridge_scale"])
        self.rollout.tensors.write_memory(2, data["mem_anchors"] * data["mem_anchor_scale"])
        self.memory.cache.set_memory(True, data["mem_anchors"].shape[2])

    def run(self, data: dict[str, np.ndarray], tag: str, force_sink: bool = False) -> None:
        """The forward `tag`, committed and compared."""
        latents, start = data[f"{tag}_input"], int(data[f"{tag}_start_frame"])
        frames, window = latents.shape[1], int(data[f"{tag}_window_frames"])
        step = int(np.argmin(np.abs(np.array(self.passes) - float(data[f"{tag}_t"]))))
        assert abs(self.passes[step] - float(data[f"{tag}_t"])) < 1e-3
        keys = self.memory.begin(start, frames, window, force_sink)
        assert keys == data[f"{tag}_k_len"], tag
        self.rollout.tensors.load(latents)
        self.memory.forward(step, None, self.prompt)
        close(self.rollout.tensors.x0(), data[f"{tag}_x0"], f"{tag}: x0")
        self.memory.commit()
        first, end = data[f"{tag}_write_range"].tolist()
        after = slots(self.rollout, "{}")
        close(after["k"][:, :, first:end], data[f"{tag}_new_k"], f"{tag}: new K")
        close(after["v"][:, :, first:end], data[f"{tag}_new_v"], f"{tag}: new V")
        self.memory.cache.check_integrity()


def _times(scenario: Scenario) -> Any:
    from swiftvideo.export.models.schedule import Schedule

    return Schedule(scenario.shift, scenario.denoising_steps, scenario.context_noise).passes


def compare_cache(bench: Bench, data: dict[str, np.ndarray], tag: str) -> None:
    after = slots(bench.rollout, "{}")
    close(after["k"], data[f"{tag}_cache_k"], f"{tag}: K")
    close(after["v"], data[f"{tag}_cache_v"], f"{tag}: V")
    assert bench.memory.cache.local_end == data[f"{tag}_local_end"]
    assert bench.memory.cache.global_end == data[f"{tag}_global_end"]


@every_engine
def test_first_chunk(scenario: Scenario, engine: str) -> None:
    data = recorded("single_chunk.npz")
    Bench(scenario, engine, data["prompt_embeds"]).run(data, "first")


@every_engine
@pytest.mark.parametrize("tag", ["plain", "window7", "mem_w12", "mem_w9", "mem_w7", "mem_w5", "mem_w4"])
def test_chunk_from_a_full_cache(scenario: Scenario, engine: str, tag: str) -> None:
    data = recorded("single_chunk.npz")
    bench = Bench(scenario, engine, data["prompt_embeds"])
    bench.fill(data["state12_cache_k"], data["state12_cache_v"], 192, 192)
    if tag.startswith("mem"):
        bench.remember(data)
    bench.run(data, tag)
    if tag == "plain":
        compare_cache(bench, data, "after_plain")
        bench.run(data, "recompute")
        compare_cache(bench, data, "after_recompute")


@every_engine
@pytest.mark.parametrize("tag", ["recache_g1", "recache_g0"])
def test_recache(scenario: Scenario, engine: str, tag: str) -> None:
    data = recorded("single_recache.npz")
    bench = Bench(scenario, engine, data["prompt_embeds"])
    ends = int(data[f"{tag}_before_local_end"]), int(data[f"{tag}_before_global_end"])
    bench.fill(data[f"{tag}_before_cache_k"], data[f"{tag}_before_cache_v"], *ends)
    bench.run(data, tag, force_sink=tag == "recache_g0")
    compare_cache(bench, data, f"{tag}_after")


def test_window_table(scenario: Scenario) -> None:
    """Every row of the recorded window function; its base is 12 and its sink 3."""
    table = recorded("units.npz")["window_table"]
    for base, smallest, post, pre, age, distance, frames in table.tolist():
        settings = WindowSettings(True, int(smallest), post, pre)
        current, upcoming = 1000 + int(age), None if distance < 0 else 1000 + int(age + distance)
        assert base == scenario.geometry.window and scenario.geometry.sink == 3
        assert window_frames(settings, scenario.geometry, current, 1000, upcoming) == frames


def test_switch_strength() -> None:
    data = recorded("units.npz")
    signatures = data["prompt_signature"]
    for old in range(3):
        rho = switch_strength(np.repeat(signatures[old : old + 1], 3, 0), signatures)
        close(rho, data["prompt_rho"][old], "rho", 1e-6)


@every_engine
def test_signature(scenario: Scenario, engine: str) -> None:
    data = recorded("units.npz")
    made = engine_of(scenario, engine).condition(data["prompt_table"]).signature
    close(made, data["prompt_signature"], "signature")


@every_engine
@pytest.mark.parametrize("name", ["full", "two", "one", "low"])
def test_bridge_and_anchor(scenario: Scenario, engine: str, name: str) -> None:
    """Injection with many frames, two, fewer than two, and without motion."""
    data = recorded("units.npz")
    bench = Bench(scenario, engine, data["prompt_table"][:1])
    values, frames = data[f"bridge_{name}_v"], int(data[f"bridge_{name}_frames"])
    tokens = frames * scenario.geometry.frame_tokens
    state = bench.rollout.tensors.export_state()
    g = scenario.geometry
    state["cache_v"][:, :, g.memory_rows : g.memory_rows + tokens] = values[:, :, :tokens]
    bench.rollout.tensors.import_state(state)
    spans = spans_of(frames, g.frame_tokens, g.memory_rows, g.sink)
    if frames >= g.sink:  # the core never holds fewer frames
        found = np.zeros((5, 3, 2), np.int32)
        bench.memory.cache.restore((g.frame_tokens, g.window, g.sink, g.max_anchors, 0, tokens, tokens, 0, 0))
        bench.memory.cache.spans(2, 6, found.data)
        assert rows_of(found) == rows_of(spans)
    signature = data["prompt_signature"]
    rho = np.array([data[f"bridge_{name}_rho"]], np.float32)
    bridge, anchor = bench.rollout.tensors.inject(spans, signature[:1], signature[1:2], rho, 0.35)
    close(bridge, data[f"bridge_{name}_k"], "bridge")
    close(anchor, data[f"bridge_{name}_anchor"], "anchor")


def spans_of(frames: int, tokens: int, first: int, sink: int) -> np.ndarray:
    """Spans of the injection for `frames` frames that lie in order from row `first`; recent 2 and 6 frames."""
    spans = np.zeros((5, 3, 2), np.int32)
    for index, (start, count) in enumerate(
        (
            (frames - 1, 1),
            (frames - 2, 1 if frames > 1 else 0),
            (frames - min(frames, 2), min(frames, 2)),
            (0, min(frames, sink)),
            (frames - min(frames, 6), min(frames, 6)),
        )
    ):
        spans[index, 0] = (first + start * tokens, count * tokens) if count else (0, 0)
    return spans


def rows_of(spans: np.ndarray) -> list[list[int]]:
    """Rows of each span."""
    return [
        [row for start, length in span for row in range(start, start + length)] for span in spans.tolist()
    ]
