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
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path
from threading import Thread, current_thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swiftvideo.export import cuda, restore, torch_engine
from swiftvideo.export.convolutions import TRIALS, channels_last, fastest
from swiftvideo.export.cuda import (
    COMPILED,
    CudaEngine,
    Options,
    compile_blocks,
    compile_decoding,
)
from swiftvideo.export.fused_blocks import LinearGelu, join_gelu, place_keys, qkv_into
from swiftvideo.export.lanes import Lane
from swiftvideo.export.models import vae as models_vae
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.export.models.vae import StreamingDecoder
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


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in three dimensions, which the engines for CPUs avoid."""
    monkeypatch.setattr(models_vae, "_flat", lambda *_: False)


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


def test_layouts_do_not_change_the_frames() -> None:
    plain, changed = small.checkpoint().vae, small.checkpoint().vae
    channels_last(changed)
    latents = torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    made = []
    with torch.no_grad():
        for decoder in (plain, changed):
            _, caches = decoder.decode_first_float(latents[:, :1])
            made.append(decoder.decode_float(latents, caches)[0])
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)


def test_the_decoder_compiles_as_one_graph() -> None:
    """And gives the same frames, in a stream too."""
    import torch._dynamo as dynamo

    dynamo.reset()
    decoder = small.checkpoint().vae
    channels_last(decoder)
    compiled = torch.compile(decoder.decode, dynamic=False, backend="aot_eager", fullgraph=True)
    latents = torch.randn(1, 7, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, theirs = decoder.decode_first(latents[:, :1])
        ours = list(theirs)
        for start in (1, 4):
            expected, theirs = decoder.decode(latents[:, start : start + 3], theirs)
            made, ours = compiled(latents[:, start : start + 3], ours)
            assert int((made.int() - expected.int()).abs().max()) <= 1
    dynamo.reset()


@pytest.mark.parametrize("wanted", [True, False])
def test_blocks_are_what_the_options_say(wanted: bool) -> None:
    _, engine = engines(options=Options(joined_gelu=wanted, placed_keys=wanted))
    for block in engine.model.layers:
        assert isinstance(block.ffn[0], LinearGelu) is wanted
        assert (block.qkv_into.__func__ is qkv_into) is wanted


def test_the_decoder_is_compiled_with_what_saves_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor is asked for, as it gets it; torch.compile refuses names that Inductor does not know."""
    import torch._inductor.compile_fx as inductor

    asked: list[Any] = []

    def compile_fx(graph: Any, inputs: Any, config_patches: Any = None, **_: Any) -> Any:
        asked.append(config_patches)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    compiled = compile_decoding(torch.relu)
    assert compiled(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    assert asked == [{"realize_reads_threshold": 16}]
    torch._dynamo.reset()


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


def test_the_decoder_stays_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that do not are concatenated to inputs that do not, in every chunk: a copy before each convolution."""
    seen: list[torch.Tensor] = []

    def last(value: torch.Tensor) -> bool:
        return value.is_contiguous(
            memory_format=torch.channels_last_3d if value.ndim == 5 else torch.channels_last
        )

    def as_cudnn(name: str) -> Any:
        original = getattr(torch.nn.functional, name)

        def convolve(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            seen.append(x)
            made: torch.Tensor = original(x, weight, *rest, **more)
            layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
            return made.contiguous(memory_format=layout) if last(x) or last(weight) else made

        return convolve

    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(torch.nn.functional, name, as_cudnn(name))
    _, engine = engines()
    g = engine.geometry
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    latents = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    session = engine.open()
    for _ in range(2):
        seen.clear()
        session.decode(latents)
        assert session.vae_caches and all(map(last, session.vae_caches))
    assert len(seen) > 5 and all(map(last, seen[1:])), "but for the latents"
    other = engine.open()
    other.import_state(session.export_state())
    assert other.vae_caches and all(map(last, other.vae_caches))


def test_only_whole_chunks_are_decoded_by_what_was_compiled() -> None:
    """A video's first chunk has a frame less: compiling that too takes as long again, for once in a video."""
    _, engine = engines()
    plain, compiled = engine._decode, []
    engine._decode = lambda latents, caches: compiled.append(latents.shape[1]) or plain(latents, caches)
    g = engine.geometry
    session = engine.open()
    for frames in (g.chunk, g.chunk, g.chunk - 1):
        session.decode(np.zeros((1, frames, g.latent_channels, g.latent_height, g.latent_width), np.float32))
    assert compiled == [g.chunk]


def test_one_thread_decodes_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's plans are the thread's that made them, and take seconds: a server warms up on another one."""
    threads, decode = [], StreamingDecoder.decode

    def watched(*arguments: Any) -> Any:
        threads.append(current_thread())
        assert not torch.is_grad_enabled(), "which is the thread's own, too"
        return decode(*arguments)

    monkeypatch.setattr(StreamingDecoder, "decode", watched)
    for caller in (Thread.start, Thread.start, Thread.run):
        _, engine = engines()
        g, session = engine.geometry, engine.open()
        latents = np.zeros((1, 2, g.latent_channels, g.latent_height, g.latent_width), np.float32)
        work = Thread(target=session.decode, args=(latents,))
        caller(work)
        if caller is Thread.start:
            work.join()
        session.close()
    assert len(threads) == 3 and len(set(threads)) == 1 and threads[0] is not current_thread()


def test_what_decoding_raises_comes_to_who_asked_and_is_freed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, engine = engines()
    session = engine.open()
    seen = weakref.ref(session)

    def failing(*_: Any) -> Any:
        raise OutOfMemoryError("full")

    monkeypatch.setattr(engine.decoder, "decode_first", failing)
    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError, match="full"):
            session.decode(np.zeros((1, 1, 1, 1, 1), np.float32))
        session.close()
        del session
        assert seen() is None, "a cycle would keep its memory"
    finally:
        gc.enable()


def test_what_was_asked_of_a_session_that_closed_meanwhile_makes_nothing() -> None:
    """As where Ctrl-C ends the wait for it."""
    _, engine = engines()
    session = engine.open()

    def refused() -> None:
        with pytest.raises(ClosedError):
            session.decode(np.zeros(1, np.float32))
        seen.append("refused")

    seen: list[str] = []
    waiting = Thread(target=refused)
    with engine.decoding():
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        session.close()
    waiting.join(10)
    assert seen == ["refused"] and session.vae_caches is None


def test_algorithms_are_tried_for_whole_chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each: a video's first frame, and what is left of its first chunk, are done once."""
    _, engine = engines()
    seen: list[tuple[int, bool]] = []

    def watched(name: str) -> Any:
        real = getattr(engine.decoder, name)

        def decode(latents: torch.Tensor, *caches: Any) -> Any:
            seen.append((latents.shape[1], torch.backends.cudnn.benchmark))
            return real(latents, *caches)

        return decode

    for name in ("decode_first", "decode"):
        monkeypatch.setattr(engine.decoder, name, watched(name))
    engine._decode = engine.decoder.decode  # type: ignore[union-attr]
    g, session = engine.geometry, engine.open()
    for _ in range(2):
        session.decode(np.zeros((1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32))
    assert seen == [(1, False), (g.chunk - 1, False), (g.chunk, True)]
    assert not torch.backends.cudnn.benchmark, "the process's own setting is what it was"


def test_trials_are_the_callers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cudnn, "benchmark_limit", 10)
    monkeypatch.setattr(cudnn, "benchmark", True)
    with pytest.raises(RuntimeError), fastest(tried=False):
        assert (cudnn.benchmark, cudnn.benchmark_limit) == (False, TRIALS)
        raise RuntimeError
    assert (cudnn.benchmark, cudnn.benchmark_limit) == (True, 10)


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
