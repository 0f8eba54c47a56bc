"""The TensorRT engine's own code, on an emulated GPU, against the ONNX Runtime engine: the same video to the last bit
of the decoder's input, switches, sink and state included. What a GPU adds to this is listed in docs/hardware.md.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from swiftvideo.export.verify import ENGINES, verify_bundle
from swiftvideo.runtime.engines import tensorrt as engine_module
from swiftvideo.runtime.engines.cuda import PinnedPool, from_bits, layout, to_bits
from swiftvideo.runtime.engines.onnxruntime import OnnxRuntimeEngine
from swiftvideo.runtime.engines.tensorrt import TensorRTEngine
from swiftvideo.runtime.errors import (
    ClosedError,
    EngineError,
    OutOfMemoryError,
    SettingsError,
    UsageError,
)
from swiftvideo.runtime.manifest import GRAPHS, Manifest, measure_files
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.pipeline import Pipeline
from swiftvideo.runtime.plugins.flavours import RTX, Flavour
from swiftvideo.runtime.plugins.kernel import COMMIT, PLACE
from swiftvideo.runtime.plugins.plans import PlanInfo, graph_source
from swiftvideo.runtime.rollout import Rollout
from swiftvideo.sdk import bench, bench_table
from tests.gpu.plans import POLICIES, compare, embeds, rollouts

from .driver import FakeDriver
from .emulator import Context, Network, compute, fake_trt, kernel


@pytest.fixture(scope="module")
def manifest(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The small bundle with "plans" that name its graphs."""
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("engine") / "bundle"))
    bundle = Manifest.load(folder)
    for name in ("trt", "kernels"):
        (folder / name).mkdir()
    plans = []
    for graph in GRAPHS:
        (folder / "trt" / f"{graph}.plan").write_text(graph)
        plans.append(
            PlanInfo(
                graph=graph,
                target="rtx:sm89",
                flavour=RTX.name,
                version="1.0",
                capability=89,
                dtype="fp32",
                file=f"trt/{graph}.plan",
                layers="",
                source=graph_source(bundle, graph),
                plugins={},
            ).entry()
        )
    for op in (COMMIT, PLACE):
        for name, content in kernel(op, bundle.geometry.head_dim).files().items():
            (folder / name).write_bytes(content)
    return dataclasses.replace(bundle, files=measure_files(folder), plans=tuple(plans)).save(folder)


@pytest.fixture
def engine(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorRTEngine]:
    driver = FakeDriver()
    driver.on_launch = lambda launch: (
        driver.do(launch.stream, lambda: compute(launch, manifest.geometry.head_dim)) and None
    )
    monkeypatch.setattr(engine_module, "cuda_driver", lambda: driver)
    monkeypatch.setattr(engine_module, "register", lambda trt: None)
    monkeypatch.setattr(Flavour, "installed", property(lambda self: "1.0" if self is RTX else None))
    monkeypatch.setattr(Flavour, "load", lambda self: fake_trt(manifest, driver))
    made = TensorRTEngine(manifest)
    yield made
    made.close()
    assert not driver.capturing and not driver.recorded


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_video_as_onnx_runtime(manifest: Manifest, engine: TensorRTEngine, name: str) -> None:
    found = compare(manifest, engine, OnnxRuntimeEngine(manifest, threads=1), POLICIES[name])
    assert found.latents <= 2e-5 and found.levels <= 1 and not found.windows_differ
    assert found.modes and engine.driver.graphs == {}, "every captured graph was destroyed"


def test_denoise_is_captured_once_for_each_number_of_frames(
    manifest: Manifest, engine: TensorRTEngine
) -> None:
    plain = OnnxRuntimeEngine(manifest, threads=1)
    seen = set()
    for ours, theirs in rollouts(manifest, (engine, plain), POLICIES["full recaches"], 7):
        ours.advance(), theirs.advance()
        seen.add(len(engine.driver.graphs))
    assert max(seen) == 3, "chunks of 3, and recaches of 6 and 12 frames"


def test_prompts_are_encoded_alike(manifest: Manifest, engine: TensorRTEngine) -> None:
    plain = OnnxRuntimeEngine(manifest, threads=1)
    ids = np.array([[3, 4, 5, 1, 0, 0]], np.int64)
    mask = (ids > 0).astype(np.int64)
    a, b = engine.encode(ids, mask, "words"), plain.encode(ids, mask, "words")
    np.testing.assert_allclose(a.signature, b.signature, atol=1e-5)
    before = len(engine.driver.allocated)
    del a
    assert len(engine.driver.allocated) == before - 1, "a prompt's tensors go with it"


def test_a_refused_prompt_leaves_no_memory_behind(engine: TensorRTEngine) -> None:
    g, before = engine.geometry, len(engine.driver.allocated)
    with pytest.raises(EngineError, match="signature is not finite"):
        engine.condition(np.full((1, g.text_len, g.text_dim), 3e38, np.float32))
    assert len(engine.driver.allocated) == before


def test_prompts_are_made_in_any_thread_and_freed_in_any(
    manifest: Manifest, engine: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps its own tensors, without another context or buffer than those made at the start."""
    plain = OnnxRuntimeEngine(manifest, threads=1)
    before = dict(engine.driver.allocated)
    made = []
    monkeypatch.setattr(Network, "create_execution_context", made.append)
    with ThreadPoolExecutor(4) as pool:
        prompts = list(pool.map(lambda seed: engine.condition(embeds(manifest, seed)), range(12)))
        for seed, prompt in enumerate(prompts):
            np.testing.assert_allclose(
                prompt.signature, plain.condition(embeds(manifest, seed)).signature, atol=1e-5
            )
        assert not made and len(engine.driver.allocated) == len(before) + 12
    thread = threading.Thread(target=prompts.clear)  # a thread that never saw the GPU
    del prompt
    thread.start()
    thread.join()
    assert engine.driver.allocated == before


def test_a_prompt_that_fails_leaves_nothing(
    manifest: Manifest, engine: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(engine.driver.allocated)
    monkeypatch.setattr(engine.driver, "cuMemcpyDtoHAsync", lambda *_: (1,))
    with pytest.raises(EngineError, match="copying back"):
        engine.condition(embeds(manifest, 0))
    assert engine.driver.allocated == before


def test_closing_frees_all_but_living_prompts(manifest: Manifest, engine: TensorRTEngine) -> None:
    prompt = engine.condition(embeds(manifest, 0))
    engine.close()
    engine.close()
    assert len(engine.driver.allocated) == 1
    del prompt
    assert not engine.driver.allocated


def test_state_moves_to_another_session(manifest: Manifest, engine: TensorRTEngine) -> None:
    plain = OnnxRuntimeEngine(manifest, threads=1)
    for ours, theirs in rollouts(manifest, (engine, plain), POLICIES["bridges"], 6):
        a, b = ours.advance(), theirs.advance()
        ours.tensors.decode(a.latents), theirs.tensors.decode(b.latents)
        state, wanted = ours.tensors.export_state(), theirs.tensors.export_state()
    assert set(state) == set(wanted) and "sink_k" in state
    for key, value in wanted.items():
        np.testing.assert_allclose(state[key], value, atol=1e-4, err_msg=key)
    fresh = engine.open()
    fresh.import_state(wanted)
    for key, value in fresh.export_state().items():
        np.testing.assert_array_equal(value, wanted[key])
    vae = wanted["vae_cache_0"]
    for name, value in (
        ("cache_k", wanted["cache_k"][:, :, 1:]),
        ("sink_k", np.ones(1, np.float32)),
        ("vae_cache_0", vae.astype(np.float64)),
        ("vae_cache_99", vae),
    ):
        with pytest.raises(UsageError, match=f"{name} of the saved state is .*restore it with the bundle"):
            fresh.import_state(wanted | {name: value})
    fresh.close()


def test_copies_of_sessions_keep_and_share_their_memory(manifest: Manifest, engine: TensorRTEngine) -> None:
    """The same pinned memory for copies that come one after the other; one that is held is nobody else's."""
    g, session = manifest.geometry, engine.open()
    pinned = engine.driver.pinned
    before = len(pinned)
    first = session.export_state()
    assert set(first) == {"cache_k", "cache_v"} and len(pinned) == before + 1
    session.write_memory(0, np.ones((g.layers, 1, 2, g.heads, g.head_dim), np.float32))
    session.place_sink(np.ones(g.time_pairs), np.zeros(g.time_pairs))
    second = session.export_state()
    assert not first["cache_k"].any() and second["cache_k"][:, :, :2].all() and "sink_k" in second
    assert len(pinned) == before + 2
    del first
    third = session.export_state()
    assert len(pinned) == before + 2 and second["cache_k"][:, :, :2].all()
    view = third["cache_v"][0]
    del third, second
    session.export_state()
    assert len(pinned) == before + 2 and view.any()
    session.close()
    engine.close()
    assert len(pinned) == 1 and view.any()
    del view
    assert not pinned


def test_a_copy_that_a_collection_drops_within_the_pool_goes_back() -> None:
    """A collection runs in any thread, also in one that is just taking memory."""
    pool = PinnedPool(FakeDriver(), None)
    address, held = pool.take(8)
    kept = [held]
    del held

    def collected() -> None:
        with pool._lock:
            kept.clear()

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert pool.take(8)[0] == address


def test_a_state_in_bfloat16_is_half_as_large_and_comes_back(engine: TensorRTEngine) -> None:
    """As from plans in bfloat16, whose sessions keep it."""
    session, other = engine.open(), engine.open()
    for one in (session, other):
        arena = one._arena
        assert arena is not None
        arena.tensors = {
            name: (shape, "bf16" if name.startswith("cache") else dtype)
            for name, (shape, dtype) in arena.tensors.items()
        }
    values = np.random.default_rng(0).standard_normal(session._arena.tensors["cache_k"][0])  # type: ignore[union-attr]
    session._upload_all("cache_k", values)
    state = session.export_state()
    assert {value.dtype for value in state.values()} == {np.dtype(np.uint16)}
    np.testing.assert_array_equal(state["cache_k"], to_bits(values, "bf16"))
    other.import_state(state)
    for name, value in other.export_state().items():
        np.testing.assert_array_equal(value, state[name])
    session.close()
    other.close()


def test_a_session_gives_everything_back(engine: TensorRTEngine) -> None:
    before = dict(engine.driver.allocated)
    session = engine.open()
    session.close()
    session.close()
    assert engine.driver.allocated == before
    with pytest.raises(ClosedError):
        session.x0()


def test_verify_compares_the_plans_too(manifest: Manifest, engine: TensorRTEngine) -> None:
    before = dict(engine.driver.allocated)
    report = verify_bundle(str(manifest.folder), threads=1)
    assert not report.failures and not report.unavailable
    for name in ENGINES:
        assert {check.graph for check in report.checks if check.engine == name} == set(GRAPHS)
    assert engine.driver.allocated == before


def test_verify_finds_a_plan_that_computes_something_else(
    manifest: Manifest, engine: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TensorRTEngine.run

    def wrong(self: TensorRTEngine, *arguments: Any) -> list[Any]:
        return [value * 1.1 for value in run(self, *arguments)]

    monkeypatch.setattr(TensorRTEngine, "run", wrong)
    report = verify_bundle(str(manifest.folder), threads=1, graphs=["condition"])
    assert {check.engine for check in report.failures} == {"tensorrt"}


def test_verify_names_what_the_gpu_lacks(manifest: Manifest, engine: TensorRTEngine) -> None:
    folder = str(manifest.folder)
    engine.driver.capability = (9, 0)
    report = verify_bundle(folder, threads=1, graphs=["inject"])
    assert list(report.unavailable) == ["tensorrt"]
    assert "capability 89 and this one has 90" in report.unavailable["tensorrt"]


def test_bench_measures_it(
    manifest: Manifest, engine: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "open_pipeline", lambda *_: Pipeline(engine, manifest))
    monkeypatch.setattr(bench, "SWITCHES", 2)
    made = bench.measure(chunks=2, memory_chunks=0)
    assert (made["engine"], made["gpu"]) == ("tensorrt", "A test")
    assert made["gpu_memory_mib"]["one_session"] == {"allocated": 4096.0}, "8 GiB, of which 4 are free"
    assert made["stages"]["denoise"]["median"] > 0 < made["frames_per_second"]["with_decoding"]
    assert made["limits"] is None and "measured with torch" in made["work_unknown"], "not the CPU's"
    console = Console(record=True, width=200, file=io.StringIO())
    bench_table.show(made, console)
    assert "GPU memory 4096 MiB with the weights, 4096 MiB with a session\n" in console.export_text()


def test_wrong_calls(manifest: Manifest, engine: TensorRTEngine) -> None:
    g = manifest.geometry
    with pytest.raises(SettingsError, match="batch is 2"):
        engine.open(2)
    session, prompt = engine.open(), engine.condition(embeds(manifest, 0))
    table = np.zeros((6, 2), np.int32)
    time = np.zeros((g.chunk, g.time_pairs), np.float32)
    with pytest.raises(UsageError, match=r"call load\(\) first"):
        session.denoise(0, None, time, time, table, prompt)
    with pytest.raises(UsageError, match=r"call denoise\(\) first"):
        session.commit(np.zeros((0, 3), np.int32))
    many = np.zeros((1, g.window + 1, g.latent_channels, g.latent_height, g.latent_width), np.float32)
    with pytest.raises(UsageError, match="larger than a session's"):
        session.load(many)
    session.close()
    engine.close()
    with pytest.raises(ClosedError):
        engine.condition(embeds(manifest, 0))


def test_bfloat16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 100
    values[:4] = (1.00390625, 1.01171875, 0.0, -65536.0)  # ties, and exact ones
    wanted = torch.from_numpy(values).bfloat16()
    bits = to_bits(values, "bf16")
    assert np.array_equal(bits, wanted.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(from_bits(bits.view(np.uint8), "bf16"), wanted.float().numpy())


def test_tensors_of_an_arena_do_not_overlap() -> None:
    offsets, size = layout({"a": ((3, 5), "fp32"), "b": ((), "int64"), "c": ((100,), "bf16")})
    assert offsets == {"a": 0, "b": 512, "c": 1024} and size == 1536


def test_a_shape_that_the_plan_refuses_is_an_engine_error(engine: TensorRTEngine, manifest: Manifest) -> None:
    with pytest.raises(EngineError, match="TensorRT refuses embeds of shape"):
        engine.run("condition", ["signature"], {"embeds": np.zeros((2, 6, 16), np.float32)})


def test_what_a_plugin_raised_is_in_the_message(
    engine: TensorRTEngine, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "execute_async_v3", lambda *_: False)
    monkeypatch.setattr(engine_module, "last_failure", lambda: "EngineError: launching failed")
    with pytest.raises(EngineError, match="failed to run condition: EngineError: launching failed"):
        engine.condition(embeds(manifest, 0))


def test_no_memory_for_a_context_costs_nothing(
    engine: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(engine.driver.allocated)
    monkeypatch.setattr(Network, "create_execution_context", lambda *_: None)
    with pytest.raises(OutOfMemoryError, match="cannot prepare inject"):
        engine.open()
    assert engine.driver.allocated == before


def begun(engine: TensorRTEngine, manifest: Manifest) -> Rollout:
    g = manifest.geometry
    noise = PhiloxNoise(5, (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width))
    return Rollout(engine, POLICIES["bridges"], engine.condition(embeds(manifest, 0)), noise)


def refusing(driver: FakeDriver) -> Any:
    """`execute_async_v3` that fails within a capture."""
    execute = Context.execute_async_v3
    return lambda self, stream: int(stream) not in driver.capturing and execute(self, stream)


def test_a_capture_that_fails_is_ended_and_names_its_cause(
    engine: TensorRTEngine, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX, which said before that it would not."""
    before, driver = dict(engine.driver.allocated), engine.driver
    rollout = begun(engine, manifest)
    monkeypatch.setattr(Context, "is_stream_capturable", lambda *_: True, raising=False)
    monkeypatch.setattr(Context, "execute_async_v3", refusing(driver))
    with pytest.raises(EngineError, match="failed to run denoise"):
        rollout.advance()
    rollout.close()
    assert not driver.capturing
    del rollout
    assert driver.allocated == before


def test_nothing_is_collected_while_denoise_is_captured(
    engine: TensorRTEngine, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed session's memory would be freed in the middle of it."""
    driver, seen = engine.driver, set()
    execute = Context.execute_async_v3

    def watched(self: Context, stream: int) -> bool:
        seen.add((int(stream) in driver.capturing, gc.isenabled()))
        return execute(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", watched)
    begun(engine, manifest).advance()
    assert seen == {(True, False), (False, True)} and gc.isenabled()


@pytest.mark.parametrize("product", ["TensorRT-RTX", "TensorRT"])
def test_a_plan_that_cannot_be_captured_runs_all_the_same(
    engine: TensorRTEngine, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, product: str
) -> None:
    """TensorRT-RTX says so when it is asked, TensorRT by failing."""
    wanted = begun(engine, manifest).advance().latents
    if product == "TensorRT":
        reason = "TensorRT failed to run denoise"
        monkeypatch.setattr(Context, "execute_async_v3", refusing(engine.driver))
    else:
        reason = "TensorRT-RTX cannot capture its plan"
        monkeypatch.setattr(Context, "is_stream_capturable", lambda *_: False, raising=False)
    graphs = len(engine.driver.graphs)
    rollout = begun(engine, manifest)
    with pytest.warns(RuntimeWarning, match=f"denoise runs without a CUDA graph, which is slower: {reason}"):
        latents = rollout.advance().latents
    np.testing.assert_array_equal(latents, wanted)
    rollout.advance()  # says it no second time
    assert len(engine.driver.graphs) == graphs


def test_a_comparison_keeps_what_was_warned_of(
    engine: TensorRTEngine, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "execute_async_v3", refusing(engine.driver))
    found = compare(manifest, engine, OnnxRuntimeEngine(manifest, threads=1), POLICIES["bridges"])
    assert found.latents <= 2e-5 and found.warnings
    assert all(text.startswith("denoise runs without a CUDA graph") for text in found.warnings)
