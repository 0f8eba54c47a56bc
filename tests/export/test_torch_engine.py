from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftvideo.export.restore import engine_of
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime import Manifest, UsageError
from swiftvideo.runtime.engines.onnxruntime import OnnxRuntimeEngine
from swiftvideo.runtime.engines.state import floats
from tests.gpu.plans import POLICIES, compare, rollouts

State = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def manifest(small_bundle: Path) -> Manifest:
    return Manifest.load(small_bundle)


@pytest.fixture(scope="module")
def engine(manifest: Manifest) -> TorchEngine:
    return engine_of(manifest, torch.device("cpu"))


@pytest.fixture(scope="module")
def state(manifest: Manifest, engine: TorchEngine) -> State:
    """After six chunks, with a placed sink."""
    for (rollout,) in rollouts(manifest, (engine,), POLICIES["bridges"], 6):
        rollout.tensors.decode(rollout.advance().latents)
        found: State = rollout.tensors.export_state()
    assert "sink_k" in found and "vae_cache_1" in found
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_video_as_onnx_runtime(manifest: Manifest, engine: TorchEngine, name: str) -> None:
    """Under "full recaches" the sink is committed anew: what was kept of the one before is of no use then."""
    found = compare(manifest, engine, OnnxRuntimeEngine(manifest, threads=1), POLICIES[name])
    assert found.latents <= 2e-5 and found.levels <= 1 and not found.windows_differ and found.modes


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_state_moves_to_another_session(
    manifest: Manifest, engine: TorchEngine, state: State, name: str
) -> None:
    """Floats come in either dtype, as bundles in float16 give them out in one or the other."""
    other = engine if name == "torch" else OnnxRuntimeEngine(manifest, threads=1)
    half = {key: value.astype(np.float16) for key, value in state.items()}
    for given in (state, half):
        session = other.open()
        session.import_state(given)
        found = session.export_state()
        assert found.keys() == given.keys()
        for key, value in found.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, given[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_is_as_large_as_what_the_engine_keeps_and_none_of_it_changes(
    manifest: Manifest, dtype: torch.dtype
) -> None:
    engine = engine_of(manifest, torch.device("cpu"))
    engine.model.to(dtype)
    assert engine.decoder is not None
    engine.decoder.to(dtype)
    session, other = engine.open(), engine.open()
    g = manifest.geometry
    latents = np.random.default_rng(0).standard_normal(
        (2, 1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32
    )
    numbers = torch.from_numpy(np.random.default_rng(1).standard_normal(session.cache_k.shape, np.float32))
    session.cache_k.copy_(numbers)
    turn = np.cos([0.5] * g.time_pairs), np.sin([0.5] * g.time_pairs)
    session.place_sink(*turn)
    session.decode(latents[0])
    state = session.export_state()
    held = {name: value.copy() for name, value in state.items()}
    wanted = np.uint16 if dtype is torch.bfloat16 else np.float16
    assert {value.dtype for value in state.values()} == {np.dtype(wanted)}
    assert state["cache_k"].nbytes == session.cache_k.nbytes and "sink_k" in state and "vae_cache_0" in state
    np.testing.assert_array_equal(floats(state["cache_k"]), session.cache_k.float().numpy())
    other.import_state(state)
    torch.testing.assert_close(other.cache_k, session.cache_k, rtol=0, atol=0)
    np.testing.assert_array_equal(other.decode(latents[1]), session.decode(latents[1]))
    session.write_memory(0, np.ones((g.layers, 1, 2, g.heads, g.head_dim), np.float32))
    session.place_sink(*turn)
    session.cache_v.fill_(3)
    for name, value in held.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_bfloat16_of_a_state_are_numbers_to_an_engine_without_them(manifest: Manifest, state: State) -> None:
    narrow = {
        name: torch.from_numpy(value).bfloat16().view(torch.int16).numpy().view(np.uint16)
        for name, value in state.items()
    }
    session = OnnxRuntimeEngine(manifest, threads=1).open()
    session.import_state(narrow)
    for name, value in session.export_state().items():
        np.testing.assert_allclose(value, state[name], rtol=2**-8, err_msg=name)


CHANGES: dict[str, Callable[[State], Any]] = {
    "no cache_k": lambda state: state.pop("cache_k"),
    "no cache_v": lambda state: state.pop("cache_v"),
    "one layer": lambda state: state.update(cache_v=state["cache_v"][:1]),
    "fewer rows": lambda state: state.update(cache_k=state["cache_k"][:, :, 1:]),
    "a sink of one number": lambda state: state.update(sink_k=np.ones(1, np.float32)),
    "float64": lambda state: state.update(cache_v=state["cache_v"].astype(np.float64)),
    "whole numbers": lambda state: state.update(vae_cache_0=state["vae_cache_0"].astype(np.int32)),
    "a VAE cache of another size": lambda state: state.update(vae_cache_1=state["vae_cache_1"][..., 1:]),
    "a VAE cache of two videos": lambda state: state.update(vae_cache_1=state["vae_cache_1"].repeat(2, 0)),
    "a VAE cache less": lambda state: state.pop("vae_cache_1"),
    "a VAE cache more": lambda state: state.update(vae_cache_99=state["vae_cache_1"]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_state_that_does_not_fit_changes_nothing(
    manifest: Manifest, engine: TorchEngine, state: State, name: str, change: str
) -> None:
    wrong = dict(state)
    CHANGES[change](wrong)
    session = (engine if name == "torch" else OnnxRuntimeEngine(manifest, threads=1)).open()
    with pytest.raises(UsageError, match=r"of the saved state is .*restore it with the bundle"):
        session.import_state(wrong)
    after = session.export_state()
    assert after.keys() == {"cache_k", "cache_v"} and not any(value.any() for value in after.values())
