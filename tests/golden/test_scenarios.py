"""Every recorded run, done again by the runtime on both engines (docs/algorithm.md is the contract)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN_LATENTS

from .engines import NAMES, TOLERANCE, engine_of
from .replay import Trace, replay
from .scenario import FOLDER, SCENARIOS, Scenario

every_run = pytest.mark.parametrize("engine", NAMES)
every_scenario = pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem.removeprefix("scn_"))


@functools.cache
def scenario_of(path: Path) -> Scenario:
    return Scenario(path)


@functools.cache
def trace_of(path: Path, engine: str) -> Trace:
    torch.set_num_threads(1)
    scenario = scenario_of(path)
    return replay(scenario, engine_of(scenario, engine), with_caches=bool(scenario.caches))


def test_recordings_are_there() -> None:
    assert SCENARIOS, f"no scn_*.npz in {FOLDER}: set SWIFTVIDEO_GOLDEN to a folder that has them"


def close(ours: np.ndarray, theirs: np.ndarray, what: str, tolerance: float = TOLERANCE) -> None:
    """Same shape and values. The failure says how far off."""
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} instead of {theirs.shape}"
    error = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0))
    assert error <= tolerance, f"{what} is off by {error:.3g}"


@every_scenario
@every_run
def test_latents(path: Path, engine: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = trace_of(path, engine).latents, scenario_of(path).data["latents"]
    if ours.shape == theirs.shape:
        error = float(np.abs(ours - theirs).max())
        request.node.user_properties.append((GOLDEN_LATENTS, (engine, path.stem, error)))
    close(ours, theirs, "latents")


@every_scenario
@every_run
def test_chunks(path: Path, engine: str) -> None:
    """Windows, segments, next switches, bridge, anchors and pointers of every chunk, exactly."""
    data, chunks = scenario_of(path).data, trace_of(path, engine).chunks
    recorded = {name.removeprefix("chunk_") for name in data if name.startswith("chunk_")}
    assert recorded <= set(vars(chunks[0])), f"recorded and not compared: {recorded - set(vars(chunks[0]))}"
    for name in sorted(recorded):
        ours = np.array([getattr(chunk, name) for chunk in chunks]).astype(data[f"chunk_{name}"].dtype)
        np.testing.assert_array_equal(ours, data[f"chunk_{name}"], err_msg=name)


@every_scenario
@every_run
def test_forwards(path: Path, engine: str) -> None:
    """Position, length, key count and sink flag of every run of the backbone, exactly."""
    scenario, forwards = scenario_of(path), trace_of(path, engine).forwards
    data, tokens = scenario.data, scenario.geometry.frame_tokens
    flags = [forward.force_sink for forward in forwards]
    np.testing.assert_array_equal([forward.start * tokens for forward in forwards], data["fwd_current_start"])
    np.testing.assert_array_equal([forward.frames for forward in forwards], data["fwd_frames"])
    np.testing.assert_array_equal([forward.keys for forward in forwards], data["fwd_k_len"])
    np.testing.assert_array_equal(flags, data["fwd_sink_recache"])
    from swiftvideo.export.models.schedule import Schedule

    passes = Schedule(scenario.shift, scenario.denoising_steps, scenario.context_noise).passes
    np.testing.assert_allclose([passes[forward.step] for forward in forwards], data["fwd_t"], rtol=1e-6)


@every_scenario
@every_run
def test_switches(path: Path, engine: str) -> None:
    """Modes, frames, strengths and pointers exactly; signatures, bridges and anchors to 1e-4."""
    data, switches = scenario_of(path).data, trace_of(path, engine).switches
    assert len(switches) == sum(name.startswith("switch") and name.endswith("_mode") for name in data)
    for index, made in enumerate(switches):
        theirs = {
            k.removeprefix(f"switch{index}_"): v for k, v in data.items() if k.startswith(f"switch{index}_")
        }
        assert made.switch.mode == str(theirs["mode"])
        assert made.switch.frame == theirs["start_frame"]
        for name in ("local_end", "global_end", "num_forwards", "first_forward"):
            assert getattr(made, name) == theirs[name], f"switch {index}: {name}"
        close(made.switch.rho, theirs["rho"], "rho", 1e-6)
        close(np.array(made.switch.strength), theirs["rho_max"], "strength", 1e-6)
        close(made.old_signature, theirs["old_sig"], "old signature")
        close(made.new_signature, theirs["new_sig"], "new signature")
        for name, ours, scale in (
            ("bridge", made.bridge, made.bridge_scale),
            ("anchor", made.anchors, made.anchor_scale),
        ):
            assert (ours is not None) == (f"{name}_k" in theirs), f"switch {index}: {name}"
            if ours is not None:
                close(ours, theirs[f"{name}_k"], f"switch {index}: {name} K")
                close(ours, theirs[f"{name}_v"], f"switch {index}: {name} V")
                assert np.all(np.float32(scale) == theirs[f"{name}_scale"]), f"switch {index}: {name} scale"


@every_scenario
@every_run
def test_caches(path: Path, engine: str) -> None:
    """K and V around a switch, where they were recorded."""
    scenario = scenario_of(path)
    if not scenario.caches:
        pytest.skip("no caches were recorded for this scenario")
    ours = trace_of(path, engine).caches
    assert set(ours) == set(scenario.caches)
    for name, theirs in scenario.caches.items():
        close(ours[name], theirs[:, :, : ours[name].shape[2]], name)
