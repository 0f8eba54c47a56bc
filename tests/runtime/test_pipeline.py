from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
from tokenizers import Tokenizer

from swiftvideo.runtime import (
    BundleError,
    BundleMissingError,
    ClosedError,
    EngineError,
    EngineUnavailableError,
    Manifest,
    OutOfMemoryError,
    Pipeline,
    PolicySettings,
    SettingsError,
    UsageError,
    load,
    pipeline as module,
)
from swiftvideo.runtime.engines import host, onnxruntime as ort_engine, tensorrt
from swiftvideo.runtime.engines.onnxruntime import OnnxRuntimeEngine
from swiftvideo.runtime.manifest import FileEntry
from swiftvideo.runtime.positions import rotation, time_tables


@pytest.mark.parametrize(
    "work", ["runtime import load; load({!r})", "sdk.doctor import findings; findings()"]
)
def test_nothing_is_reported_to_anybody(tiny_bundle: Path, tmp_path: Path, work: str) -> None:
    """ONNX Runtime's telemetry begins with a database at home."""
    program = "from swiftvideo." + work.format(str(tiny_bundle))
    hidden = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(tmp_path), "CUDA_CACHE_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
    assert list(tmp_path.rglob("*")) == []


def test_load_opens_the_embedded_model_or_says_how_to_get_one(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EMBEDDED", tiny_bundle)
    with load() as opened:
        assert opened.manifest.folder == tiny_bundle and opened.engine.name == "onnxruntime"
    monkeypatch.setattr(module, "EMBEDDED", tmp_path)
    with pytest.raises(BundleMissingError, match=r"no bundle at .*swiftvideo export"):
        load()


def test_load_takes_a_path_as_text(tiny_bundle: Path, pipeline: Pipeline) -> None:
    with load(str(tiny_bundle), "onnxruntime", 3) as opened:
        assert opened.geometry == pipeline.geometry and opened.settings == opened.manifest.policy
        assert isinstance(opened.engine, OnnxRuntimeEngine) and opened.engine.threads == 3
        assert "red" in opened.words


@pytest.mark.parametrize(
    ("engine", "threads", "kind", "message"),
    [
        ("quantum", None, SettingsError, r"engine is 'quantum': use 'auto', 'onnxruntime'"),
        ("tensorrt", None, EngineUnavailableError, r"use engine='onnxruntime'"),
        ("auto", 0, UsageError, r"threads is 0: use 1 to"),
        ("auto", 100_000, UsageError, r"threads is 100000: use 1 to"),
        ("auto", "2", UsageError, r"threads is '2': use 1 to"),
        ("auto", 1.5, UsageError, r"threads is 1.5: use 1 to"),
    ],
)
def test_load_refuses_what_it_cannot_run(
    tiny_bundle: Path, engine: str, threads: int | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(tiny_bundle, engine, threads)


@pytest.mark.parametrize(
    ("plans", "engine", "fit", "taken"),
    [
        (True, "auto", True, True),
        (True, "auto", False, False),
        (True, "tensorrt", False, True),  # which says why it cannot
        (True, "onnxruntime", True, False),
        (False, "auto", True, False),
    ],
)
def test_tensorrt_is_taken_where_its_plans_run_or_where_it_is_asked_for(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plans: bool,
    engine: Any,
    fit: bool,
    taken: bool,
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle = Manifest.load(tmp_path / "bundle")
    dataclasses.replace(bundle, plans=({"target": "a test"},) if plans else ()).save(tmp_path / "bundle")
    opened: list[Manifest] = []

    class Engine:
        def __init__(self, manifest: Manifest) -> None:
            opened.append(manifest)

        def close(self) -> None:
            pass

    monkeypatch.setattr(tensorrt, "TensorRTEngine", Engine)
    monkeypatch.setattr(tensorrt, "runs", lambda manifest: fit)
    with load(tmp_path / "bundle", engine) as made:
        assert isinstance(made.engine, Engine) == taken
        assert opened == [made.manifest] * taken


def test_a_dtype_that_the_cpu_lacks_is_refused(tiny_bundle: Path) -> None:
    manifest = dataclasses.replace(Manifest.load(tiny_bundle), dtype="bf16")
    with pytest.raises(EngineUnavailableError, match=r"is bf16.*--dtype fp32"):
        OnnxRuntimeEngine(manifest, 1)


def test_a_bundle_may_be_partial_until_a_part_is_used(tiny_bundle: Path) -> None:
    whole = Manifest.load(tiny_bundle)
    files = {name: entry for name, entry in whole.files.items() if "text_encoder" not in name}
    partial = dataclasses.replace(whole, files=files)
    with Pipeline(OnnxRuntimeEngine(partial, 1), partial) as opened:
        with pytest.raises(BundleError, match=r"no graph 'text_encoder', only condition"):
            opened.encode("a red circle")
    bare = dataclasses.replace(whole, files={})
    engine = OnnxRuntimeEngine(bare, 1)
    closed: list[bool] = []
    engine.close = lambda: closed.append(True)  # type: ignore[method-assign]
    with pytest.raises(BundleMissingError, match=r"lists no tokenizer.json: export it again"):
        Pipeline(engine, bare)
    assert closed, "nobody else could"


def weights_of_an_inner_graph(folder: Path) -> bytes:
    """A graph whose branch has weights in a file of the current folder, which no manifest lists."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    (folder / "secret.bin").write_bytes(bytes(16))
    weights = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", "secret.bin"), ("offset", "0"), ("length", "16")):
        weights.external_data.add(key=key, value=value)
    x, y, o = (helper.make_tensor_value_info(name, 1, [4]) for name in "xyo")
    branch = helper.make_graph([helper.make_node("Add", ["w", "x"], ["o"])], "b", [], [o], [weights])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["o"])], "c", [], [o])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [x, condition], [y])
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return made


def format_of_its_own(folder: Path) -> bytes:
    """A graph as ONNX Runtime writes it, which it takes for one of ONNX's."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "x.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 4
    graph = (folder / "bundle/onnx/inject.onnx").read_bytes()
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return (folder / "x.ort").read_bytes()


@pytest.mark.parametrize("make", [weights_of_an_inner_graph, format_of_its_own])
def test_nothing_but_graphs_of_onnx_and_listed_files_is_opened(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[Path], bytes],
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    data, name = make(tmp_path), "onnx/inject.onnx"
    (folder / name).write_bytes(data)
    manifest = Manifest.load(folder)
    entry = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
    dataclasses.replace(manifest, files={**manifest.files, name: entry}).save(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot open onnx/inject\.onnx of"):
        load(folder, "onnxruntime", 1)
    assert not capfd.readouterr().out


@pytest.mark.parametrize("path", [5, "a\0b", b"bundle"])
def test_a_path_that_can_be_none_is_refused(path: Any) -> None:
    with pytest.raises(SettingsError, match=r"bundle .*: give the name of a folder"):
        load(path)


def test_a_closed_pipeline_refuses_work_and_ends_its_sessions(
    tiny_bundle: Path, texts: tuple[str, ...]
) -> None:
    opened = load(tiny_bundle, threads=1)
    session = opened.session(texts[0])
    next(session)
    opened.close()
    opened.close()
    for call in (opened.encode, opened.session, opened.restore):
        with pytest.raises(ClosedError, match="this pipeline was closed: load the bundle again"):
            call(texts[0])
    with pytest.raises(ClosedError, match="closed: load the bundle again"):
        next(session)
    assert session.closed


def test_policies_go_by_name_or_by_settings(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    given = PolicySettings(policy="cut", global_sink=False)
    for policy, expected in (
        (None, pipeline.settings),
        ("keep", dataclasses.replace(pipeline.settings, policy="keep")),
        (given, given),
    ):
        with pipeline.session(texts[0], policy=policy) as session:
            assert session.settings == expected
    with pytest.raises(SettingsError, match=r"policy is 'forget': use 'swift', 'recache', 'keep' or 'cut'"):
        pipeline.session(texts[0], policy="forget")
    wrong: Any = 5
    with pytest.raises(
        SettingsError, match=r"policy is 5: give PolicySettings, the name of a policy, or None"
    ):
        pipeline.session(texts[0], policy=wrong)


def test_an_engines_session_says_what_is_missing(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    g, prompt = pipeline.geometry, pipeline.encode(texts[0])
    session = pipeline.engine.open()
    latents = np.zeros((1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32)
    segments, ranges = np.zeros((6, 2), np.int32), np.array([[0, g.memory_rows, g.frame_tokens]], np.int32)
    segments[0] = g.rows, g.chunk * g.frame_tokens
    tables = time_tables(0, g.chunk, g.time_pairs)
    with pytest.raises(UsageError, match=r"no latents are loaded: call load\(\) first"):
        session.denoise(0, latents, *tables, segments, prompt)
    with pytest.raises(UsageError, match=r"nothing was denoised yet: call denoise\(\) first"):
        session.x0()
    session.load(latents)
    session.denoise(0, latents, *tables, segments, prompt)
    with pytest.raises(UsageError, match=r"nothing to commit: call denoise\(\) without noise first"):
        session.commit(ranges)
    session.denoise(g.steps, None, *tables, segments, prompt)
    session.commit(ranges)
    assert session.x0().shape == latents.shape
    session.close()
    for call in (
        lambda: session.denoise(0, None, *tables, segments, prompt),
        lambda: session.decode(latents),
    ):
        with pytest.raises(ClosedError, match="this session was closed: open a new one"):
            call()


def test_a_video_decodes_the_same_in_pieces(pipeline: Pipeline) -> None:
    g = pipeline.geometry
    shape = (1, 6, g.latent_channels, g.latent_height, g.latent_width)
    latents = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    whole, pieces = pipeline.engine.open(), pipeline.engine.open()
    frames = whole.decode(latents)
    assert frames.shape == (1, 21, g.height, g.width, 3)
    made = [pieces.decode(latents[:, a:b]) for a, b in ((0, 1), (1, 2), (2, 6))]
    assert [item.shape[1] for item in made] == [1, 4, 16]
    assert np.abs(np.concatenate(made, 1).astype(int) - frames).max() <= 1


def test_an_encoded_prompt_serves_several_sessions(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    prompt = pipeline.encode(texts[0])
    assert prompt.text == texts[0] and prompt.signature.shape == (1, pipeline.geometry.dim)
    with pipeline.session(prompt, 0) as a, pipeline.session(texts[0]) as b:
        np.testing.assert_array_equal(next(a).latents, next(b).latents)


def test_a_prompt_is_what_the_graphs_make_of_its_words(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    """Tokenizer and graphs by hand, each by its own library."""
    folder = pipeline.manifest.folder
    assert folder is not None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids, mask = np.zeros((2, 1, pipeline.geometry.text_len), np.int64)
    found = tokenizer.encode(texts[0]).ids
    ids[0, : len(found)], mask[0, : len(found)] = found, 1
    encoder, condition = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("text_encoder", "condition")
    )
    (embeds,) = encoder.run(["embeds"], {"ids": ids, "mask": mask})
    expected = condition.run(["cross_k", "cross_v", "signature"], {"embeds": embeds})
    prompt = pipeline.encode(texts[0])
    for ours, theirs in zip((*prompt.cross, prompt.signature), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# -- memory that is not there ------------------------------------------------------------------------------------


def test_a_session_beyond_the_free_memory_is_refused(
    pipeline: Pipeline, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = pipeline.geometry
    size = 2 * g.layers * g.rows * g.dim * 4
    monkeypatch.setattr(host, "available_memory", lambda: size - 1)
    with pytest.raises(OutOfMemoryError, match=r"needs \d+ MiB and \d+ MiB are free: close other sessions"):
        pipeline.session(texts[0])
    monkeypatch.setattr(host, "available_memory", lambda: size)
    pipeline.session(texts[0]).close()


def test_a_failing_allocation_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: None)
    with pytest.raises(OutOfMemoryError, match=r"a test needs 8589934592 MiB and too few are free"):
        host.zeros((1 << 50,), np.float64, "a test")
    with pytest.raises(OutOfMemoryError, match=r"a test needs \d{12,} MiB"):
        host.zeros((1 << 40, 1 << 40), np.float64, "a test")  # more than numpy can count


@pytest.mark.parametrize(
    "text", ["Failed to allocate memory for requested buffer of size 9", "std::bad_alloc"]
)
def test_missing_memory_inside_the_engine_is_told_apart(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    class Session:
        def run(self, *_: Any) -> None:
            raise RuntimeError(text)

    monkeypatch.setattr(pipeline.engine, "session", lambda graph: Session())
    with pytest.raises(OutOfMemoryError, match=rf"failed in text_encoder: no memory \({text}"):
        pipeline.encode("a red circle")
    text = "shapes differ"
    with pytest.raises(EngineError, match="shapes differ") as caught:
        pipeline.encode("a red circle")
    assert not isinstance(caught.value, OutOfMemoryError)


def test_a_session_whose_settings_do_not_fit_leaves_nothing_open(
    pipeline: Pipeline, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Any] = []

    def close(session: Any) -> None:
        closed.append(session)

    monkeypatch.setattr(ort_engine.OnnxRuntimeSession, "close", close)
    settings = PolicySettings(anchors=dataclasses.replace(PolicySettings().anchors, max=99))
    with pytest.raises(SettingsError, match=r"anchors.max is 99 and the model keeps 4 anchor rows: lower"):
        pipeline.session(texts[0], policy=settings)
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\n"}, 7168),
        ({"proc/meminfo": "MemAvailable: 7 kB\n", "max": "max\n", "current": "5\n"}, 7168),
        ({"proc/meminfo": "MemAvailable: 7 kB\n", "max": "6000\n", "current": "5000\n"}, 1000),
        ({"max": "6000\n", "current": "5000\n", "stat": "anon 1\ninactive_file 200\n"}, 1200),
        ({"max": "6000\n", "current": "7000\n"}, 0),
        ({"max": "6000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "max": "6000\n", "current": "5000\n"}, 1000),
    ],
)
def test_free_memory_is_the_machine_s_or_the_container_s(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    for name, text in files.items():
        path = tmp_path / (name if "/" in name else f"sys/fs/cgroup/memory.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host.available_memory(tmp_path) == free


@pytest.mark.parametrize("limited", ["", "system.slice", "system.slice/swiftvideo.service"])
def test_free_memory_is_that_of_the_tightest_group_above_a_process(tmp_path: Path, limited: str) -> None:
    """As systemd's MemoryMax= sets it: on the unit, or on a slice."""
    own = tmp_path / "sys/fs/cgroup/system.slice/swiftvideo.service"
    own.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/system.slice/swiftvideo.service\n")
    for group, limit in ((own.parent, 8000), (own, 7000), (own.parents[1] / limited, 6000)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("5000\n")
    (tmp_path / "sys/fs/memory.max").write_text("1\n")
    (tmp_path / "sys/fs/memory.current").write_text("0\n")
    assert host.available_memory(tmp_path) == 1000


def test_free_memory_is_asked_of_this_machine() -> None:
    free = host.available_memory()
    if Path("/proc/meminfo").exists():
        assert free is not None and 0 < free <= psutil.virtual_memory().total
    else:
        assert free is None


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    assert host.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    for told, cores in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda told=told: told)
        assert host.usable_cores() == cores


# -- the host's cache --------------------------------------------------------------------------------------------


def test_placing_the_sink_turns_its_keys_to_other_frames(pipeline: Pipeline) -> None:
    g = pipeline.geometry
    cache = host.HostCache(g, 1, np.float32)
    plain = np.random.default_rng(0).standard_normal(cache.k.shape).astype(np.float32)
    width, tokens = 2 * g.time_pairs, g.sink * g.frame_tokens

    def standing_at(first: int) -> np.ndarray[Any, Any]:
        """`plain`, with the sink's frames rotated in time to first, first + 1, ..."""
        rows = plain.copy()
        cos, sin = (
            np.repeat(t, g.frame_tokens, 0)[:, None] for t in time_tables(first, g.sink, g.time_pairs)
        )
        part = rows[:, :, g.memory_rows : g.memory_rows + tokens]
        even, odd = part[..., 0:width:2].copy(), part[..., 1:width:2].copy()
        part[..., 0:width:2], part[..., 1:width:2] = even * cos - odd * sin, even * sin + odd * cos
        return rows

    cache.k[...] = standing_at(0)
    for frames in (3, 1_000_000, 0, 7):
        cache.place_sink(*rotation(frames, g.time_pairs))
        np.testing.assert_allclose(cache.k, standing_at(frames), atol=2e-6)
    fresh = np.zeros((g.layers, 1, tokens, g.heads, g.head_dim), np.float32)
    cache.commit(np.array([[0, g.memory_rows, tokens]], np.int32), fresh, fresh)
    cache.place_sink(*rotation(5, g.time_pairs))
    assert not cache.k[
        :, :, g.memory_rows : g.memory_rows + tokens
    ].any()  # the new sink was placed, not the old
