"""The engine for GPUs, rehearsed on the CPU: the same buffers, order of work and numbers, without graphs and kernels.

What a GPU alone can show is in tests/gpu/engine.py.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftvideo.export import cuda, restore, torch_engine
from swiftvideo.export.cuda import COMPILED, CudaEngine, Options, compile_blocks
from swiftvideo.export.fused_blocks import LinearGelu, join_gelu, place_keys, qkv_into
from swiftvideo.export.lanes import Lane
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.export.torch_engine import TorchEngine, memory_for
from swiftvideo.runtime.errors import (
    ClosedError,
    EngineUnavailableError,
    OutOfMemoryError,
    SettingsError,
    UsageError,
)
from swiftvideo.runtime.geometry import BridgeSettings, PolicySettings
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.pipeline import Pipeline
from swiftvideo.runtime.plugins.kernel import ATTENTION, INJECTION, PLACE
from swiftvideo.runtime.plugins.split import Split
from swiftvideo.runtime.rollout import Step
from tests.golden.engines import TOLERANCE, engine_of
from tests.golden.replay import replay
from tests.golden.scenario import SCENARIOS, Scenario

from . import small
from .rehearsal import engines, switching

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def run(
    engine: TorchEngine, chunks: int, settings: PolicySettings
) -> tuple[list[Step], list[Any], dict[str, Any]]:
    """Chunks with a switch in the third, their frames, and the session's state after them."""
    rollout = switching(engine, settings)
    steps, frames = [], []
    for _ in range(chunks):
        steps.append(rollout.advance())
        frames.append(rollout.tensors.decode(steps[-1].latents))
    state = rollout.tensors.export_state()
    rollout.close()
    return steps, frames, state


@pytest.mark.parametrize("attention", ["kernel", "cudnn"])
@pytest.mark.parametrize("policy", ["swift", "recache"])
def test_it_computes_what_the_reference_does(policy: Any, attention: Any) -> None:
    """Switch, recache, placed sink, injected memory, decoded frames, and the state that is saved."""
    reference, rehearsed = engines(options=Options(attention=attention))
    theirs, ours = (run(engine, 6, PolicySettings(policy=policy)) for engine in (reference, rehearsed))
    assert [step.window for step in ours[0]] == [step.window for step in theirs[0]]
    for a, b in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(a.latents, b.latents, atol=1e-4)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1
    assert set(ours[2]) == set(theirs[2]) and "sink_k" in ours[2]
    for name, value in ours[2].items():
        np.testing.assert_allclose(value, theirs[2][name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("attention", ["kernel", "cudnn"])
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem.removeprefix("scn_"))
def test_recorded_latents(path: Path, attention: Any) -> None:
    scenario = Scenario(path)
    reference: Any = engine_of(scenario, "torch")
    schedule = _schedule(scenario)
    options = Options(attention=attention)
    model = copy.deepcopy(reference.model)
    engine = CudaEngine(model, reference.geometry, schedule, device="cpu", options=options, rehearse=True)
    ours = replay(scenario, engine).latents
    assert np.abs(ours - scenario.data["latents"]).max() <= TOLERANCE


def _schedule(scenario: Scenario) -> Any:
    from swiftvideo.export.models.schedule import Schedule

    return Schedule(scenario.shift, scenario.denoising_steps, scenario.context_noise)


def test_with_its_kernels_in_the_interpreter() -> None:
    """Six chunks with a bridge by the real kernels, in the order of arguments that the launches have."""
    pytest.importorskip("triton", reason="the kernels need triton")
    child = subprocess.run(
        [sys.executable, "-m", "tests.export.rehearse_kernels"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    made = json.loads(child.stdout)
    assert {*made["errors"]} >= {"chunk 5", "cache_k", "cache_v", "sink_k"}
    assert max(made["errors"].values()) < 1e-5
    assert made["launched"]["DynamicWindowAttention"] == 2 * 6 * 5 * small.BACKBONE.num_layers
    assert made["launched"]["SemanticInjection"] == 1 and made["launched"]["PlaceRows"] > 1


@pytest.mark.parametrize("policy", ["swift", "recache"])
def test_everything_lies_on_the_engines_device(
    policy: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PyTorch's meta device, which has no numbers and, as a GPU does, refuses to mix its tensors with the CPU's."""
    launched = set()

    class Engine(CudaEngine):
        def launch(self, op: str, sizes: dict[str, int], *arguments: Any) -> None:
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            assert tensors and all(value.is_meta and value.is_contiguous() for value in tensors), op
            launched.add(op)

    def zeros(value: torch.Tensor) -> Any:
        assert value.is_meta
        return np.zeros(value.shape, np.float32)

    def download(_: Lane, value: torch.Tensor) -> torch.Tensor:
        assert value.is_meta
        return torch.zeros(value.shape, dtype=value.dtype)

    for module in (cuda, torch_engine):
        monkeypatch.setattr(module, "array", zeros)
    monkeypatch.setattr(Lane, "download", download)
    monkeypatch.setattr(restore, "CudaEngine", partial(Engine, rehearse=True))
    manifest = Manifest.load(tiny_bundle)
    engine: Any = restore.engine_of(manifest, torch.device("meta"))
    engine.launchers = dict.fromkeys((ATTENTION, INJECTION, PLACE))
    engine.split = Split(128, 128, 128, 32, slots=132)
    engine.partial = torch.empty(8, device="meta")
    width = manifest.geometry.text_dim  # transformers asks the mask for its values
    engine.text_encoder = lambda ids, mask: (ids * mask)[..., None].float().expand(-1, -1, width)
    with Pipeline(engine, manifest) as pipeline:
        saved = tmp_path / "state.safetensors"
        bridged = PolicySettings(policy=policy, bridge=BridgeSettings(tau_low=2.0, tau_high=2.0))
        with pipeline.session("a red circle moving right at night", policy=bridged) as session:
            modes = []
            for number in range(5):
                if number == 3:
                    session.prompt("a blue square moving up in the fog")
                chunk = next(session)
                modes.append(chunk.mode)
                assert chunk.frames.shape[1:] == (manifest.geometry.height, manifest.geometry.width, 3)
            session.save(saved)
        with pipeline.restore(saved) as session:
            next(session)
    assert modes[3] == {"swift": "bridge-only", "recache": "full-recache"}[policy]
    assert launched >= {ATTENTION, PLACE}
    assert (INJECTION in launched) == (policy == "swift")


def test_a_state_goes_on_in_place() -> None:
    """Captured graphs know addresses: importing must not move the cache."""
    _, engine = engines()
    session = engine.open()
    address = session.cache_k.data_ptr()
    state = session.export_state()
    state["cache_k"] = state["cache_k"] + 2
    session.import_state(state)
    assert session.cache_k.data_ptr() == address and float(session.cache_k.min()) == 2


def test_what_is_decoded_on_from_a_state_stays_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state arrives in one lane and is read in the other, which the allocator has to know."""
    _, engine = engines()
    g, lent = engine.geometry, []
    latents = np.zeros((1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32)
    session, other = engine.open(), engine.open()
    session.decode(latents)
    monkeypatch.setattr(engine.decoding, "borrow", lambda *values: lent.extend(values))
    other.import_state(session.export_state())
    assert other.vae_caches and [id(value) for value in lent] == [id(value) for value in other.vae_caches]


def test_a_gpu_that_failed_is_not_called_full() -> None:
    """It would be asked again and again."""
    with pytest.raises(OutOfMemoryError, match=r"no memory for a cache \(no MiB\)"), memory_for("a cache"):
        raise torch.OutOfMemoryError("no MiB")
    with pytest.raises(torch.AcceleratorError), memory_for("a cache"):
        raise torch.AcceleratorError("illegal address", 700)
    unpinned = torch.AcceleratorError("out of memory")
    unpinned.error_code = 2  # type: ignore[attr-defined]
    with pytest.raises(OutOfMemoryError, match="no memory for a copy"), memory_for("a copy"):
        raise unpinned


def test_refusals() -> None:
    source = small.checkpoint()
    geometry = source.geometry()
    with pytest.raises(EngineUnavailableError, match=r"on 'cpu': it needs a GPU"):
        CudaEngine(source.backbone, geometry, source.schedule, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(EngineUnavailableError, match="sees no NVIDIA GPU"):
            CudaEngine(source.backbone, geometry, source.schedule)
    with pytest.raises(SettingsError, match="graphs without kernels"):
        Options(kernels=False)
    _, engine = engines()
    session = engine.open()
    with pytest.raises(UsageError, match="nothing was denoised"):
        session.x0()
    session.close()
    session.close()
    with pytest.raises(ClosedError):
        session.load(np.zeros((1, 1, 1, 1, 1), np.float32))


@pytest.mark.parametrize("wanted", [True, False])
def test_blocks_are_what_the_options_say(wanted: bool) -> None:
    _, engine = engines(options=Options(joined_gelu=wanted, placed_keys=wanted))
    for block in engine.model.layers:
        assert isinstance(block.ffn[0], LinearGelu) is wanted
        assert (block.qkv_into.__func__ is qkv_into) is wanted


def test_blocks_are_traced_once_and_compute_the_same() -> None:
    """All blocks share one compiled piece per method: thirty layers do not compile thirty times."""
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    dynamo.reset()
    torch.manual_seed(0)
    plain, compiled = (CausalWanModel(small.BACKBONE).eval() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    join_gelu(compiled)
    place_keys(compiled)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(compiled, counter)  # type: ignore[arg-type]
    latents = torch.randn(1, 3, 16, 4, 6)
    with torch.no_grad():
        time = plain.time_embed(torch.full((1, 3), 500.0))
        tables = torch.randn(2, 1, 3, small.BACKBONE.time_pairs)
        cross = plain.cross_kv(torch.randn(1, small.BACKBONE.text_len, small.BACKBONE.dim))
        expected = plain(latents, *time, *tables, *cross)
        places = torch.zeros_like(expected[1]), torch.zeros_like(expected[2])
        for fresh in (None, places):  # a recache, a chunk
            ours = compiled(latents, *time, *tables, *cross, fresh=fresh)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert ours[1] is places[0] and ours[2] is places[1]
    assert counter.frame_count == len(COMPILED)
    dynamo.reset()


def test_a_closed_session_is_freed_at_once() -> None:
    """Not when Python collects cycles: it may hold gigabytes."""
    _, engine = engines()
    gc.disable()
    try:
        rollout = switching(engine, PolicySettings())
        rollout.advance()
        held: Any = rollout.tensors
        session = weakref.ref(held)
        rollout.close()
        del rollout, held
        assert session() is None
    finally:
        gc.enable()
