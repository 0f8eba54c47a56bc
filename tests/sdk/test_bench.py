"""Work, limits and options of `swiftvideo bench`."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from swiftvideo.runtime import Manifest, UsageError, load
from swiftvideo.runtime.errors import EngineError
from swiftvideo.sdk import bench, bench_model, bench_table, limits
from swiftvideo.sdk.work import Call, Watched, work_figures
from tests.interrupting import interrupted

pytest.importorskip("onnx")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BETWEEN", 2), ("SWITCHES", 2), ("FEWEST", 2)):
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch:cpu"])
def test_both_engines_do_the_same_counted_work(tiny_bundle: Path, quick: None, engine: str) -> None:
    pytest.importorskip("torch")
    made = bench.measure(tiny_bundle, None, "recache", engine, 1, 0, seconds=2.5)
    g = Manifest.load(tiny_bundle).geometry
    frames = g.chunk * g.temporal_stride
    assert (
        made["chunks"] == -(-2.5 * g.fps // frames) and made["gpu"] is None and made["work_unknown"] is None
    )
    work = made["work"]
    assert set(work) == {"denoise", "commit", "decode", "chunk", "prompt", "recache"}
    assert work["denoise"]["gflop"] == pytest.approx(g.steps * work["commit"]["gflop"])
    parts = sum(work[stage]["gflop"] for stage in ("denoise", "commit", "decode"))
    assert work["chunk"]["gflop"] == pytest.approx(parts)
    assert work["recache"]["gflop"] == pytest.approx(g.window / g.chunk * work["commit"]["gflop"], rel=1e-6)
    for row in work.values():
        assert row["floor_ms"] > 0 and row["gflop_per_s"] == pytest.approx(1000 * row["gflop"] / row["ms"])
    assert made["limits"]["threads"] == 1 and made["limits"]["gflop_per_s"] > 0 < made["limits"]["gb_per_s"]


def test_it_says_how_far_it_is(tiny_bundle: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MEMORY_FROM", 1)
    told: list[tuple[str, int, int]] = []
    bench.measure(tiny_bundle, 3, None, "onnxruntime", 1, 2, tell=lambda *now: told.append(now))
    parts, done, totals = zip(*told, strict=True)
    g = Manifest.load(tiny_bundle).geometry
    warm_up = -(-g.window // g.chunk) + 2
    assert parts == ("memory", "memory", "warm-up", "chunks", "switches", "limits")
    assert done == (0, 1, 2, 2 + warm_up, 5 + warm_up, 9 + warm_up) and set(totals) == {9 + warm_up}


def test_every_run_is_noted(tiny_bundle: Path) -> None:
    with load(tiny_bundle, "onnxruntime", 1) as pipeline:
        g = pipeline.geometry
        watched = Watched(pipeline.engine)
        prompts = bench.prompts_for(pipeline)
        with pipeline.session(prompts[0], policy="recache") as session:
            next(session)
            first = watched.take()
            session.prompt(prompts[1])
            next(session)
            second = watched.take()
    keys = g.chunk * g.frame_tokens
    forwards = [Call("denoise", g.chunk, keys)] * g.steps + [Call("commit", g.chunk, keys)]
    assert first == [*forwards, Call("decode_first", 1), Call("decode", g.chunk - 1)]
    assert [call.stage for call in second] == ["recache", *["denoise"] * g.steps, "commit", "decode"]
    assert second[0] == Call("recache", g.chunk, keys) and second[1].keys == 2 * keys


def test_a_bundle_that_cannot_be_counted(tiny_bundle: Path) -> None:
    manifest = dataclasses.replace(Manifest.load(tiny_bundle), files={})
    result: dict[str, Any] = {
        "limits": {"gflop_per_s": 1.0, "gb_per_s": 1.0},
        "stages": {name: {"median": 1.0} for name in ("denoise", "commit", "decode")},
        "chunk": {"median": 1.0},
    }
    rows, why = work_figures(manifest, result, *[([Call("denoise", 3, 10)], 1)] * 2, [])
    assert rows is None and why is not None and "lists no onnx/denoise.onnx" in why


def test_without_onnx(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "swiftvideo.export.flops", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    rows, why = work_figures(Manifest.load(tiny_bundle), {}, ([], 1), ([], 1), [])
    assert rows is None and why == "counting work needs onnx: pip install 'swiftvideo[export]'"


def test_advice_is_printed_as_it_is() -> None:
    made = io.StringIO()
    why = "counting work needs onnx: pip install 'swiftvideo[export]'"
    console = Console(file=made)
    bench_table._show_work(
        {"limits": None, "work": None, "work_unknown": why}, console, bench_table.sayer(console)
    )
    assert why in made.getvalue()


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    for arguments, message in (
        ((None, None, False, 480), "are for --random"),
        ((None, "wan2.1-t2v-1.3b", False), "belong together"),
        ((None, None, True), "belong together"),
        ((tmp_path, "wan2.1-t2v-1.3b", True), "--bundle with --model"),
    ):
        with pytest.raises(UsageError, match=message), bench_model.measured_bundle(*arguments):  # type: ignore[arg-type]
            pass
    with bench_model.measured_bundle(tmp_path) as folder:
        assert folder == tmp_path
    with pytest.raises(UsageError, match="give one of them"):
        bench.measure(None, 8, seconds=1.0)


def test_a_random_model_is_exported_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftvideo.sdk import exporting

    seen: dict[str, Any] = {}

    def export(checkpoint: object, out: Path, **options: Any) -> None:
        seen.update(options, out=out)
        out.mkdir()

    monkeypatch.setattr(exporting, "export", export)
    with bench_model.measured_bundle(None, "wan2.1-t2v-1.3b", True, 480, 832) as folder:
        assert folder == seen["out"] and folder.is_dir()
    assert not seen["out"].exists()
    assert {k: seen[k] for k in ("random", "height", "width", "dtype")} == {
        "random": "wan2.1-t2v-1.3b",
        "height": 480,
        "width": 832,
        "dtype": "bf16",
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_random_model(tmp_path: Path, number: signal.Signals) -> None:
    program = "import time; from pathlib import Path; from swiftvideo.sdk import bench, cli, exporting\n"
    program += "exporting.export = lambda _, out, **options: Path(out).mkdir()\n"
    program += "bench.measure = lambda *_: time.sleep(600)\ncli.main()"
    command = [sys.executable, "-c", program, "bench", "--random", "--model", "wan2.1-t2v-1.3b"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    _, err = interrupted(child, number, lambda: list(tmp_path.glob("swiftvideo-bench-*/bundle")), within=120)
    assert child.returncode == 128 + number and err == "interrupted: what was not finished is removed\n"
    assert list(tmp_path.iterdir()) == []


def test_limits_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_PROGRAM", "raise SystemExit('no BLAS')")
    with pytest.raises(EngineError, match="limits failed: no BLAS"):
        limits.cpu_limits(1)


def test_engines_without_a_gpu_have_none() -> None:
    class Plain:
        device = np.dtype(np.float32)

    assert limits.gpu_of(Plain()) is None and limits.gpu_of(object()) is None


def test_speed_without_decoding_is_that_of_chunks_the_host_waited_for(
    tiny_bundle: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the context pass runs beside the host, and would be counted as decoding."""

    class Gpu:
        name, waits = "a GPU", 0

        def wait(self) -> None:
            self.waits += 1

        def memory_mib(self) -> dict[str, float]:
            return {"allocated": 1.0}

        def limits(self, dtype: str) -> dict[str, Any]:
            return {"gflop_per_s": 1.0, "gb_per_s": 1.0, "measured_with": dtype}

    gpu, made, counted = Gpu(), [], bench.steady_figures
    monkeypatch.setattr(bench, "gpu_of", lambda engine: gpu)
    monkeypatch.setattr(bench, "steady_figures", lambda timed: made.append(counted(timed)) or made[-1])
    handed: list[Any] = []
    monkeypatch.setattr(bench, "work_figures", lambda *given: (handed.append(given), ""))
    result = bench.measure(tiny_bundle, 6, None, "onnxruntime", 1, 0)
    beside, apart = made
    assert gpu.waits == 3, "half as many chunks are waited for"
    assert result["stages"] == apart["stages"] != beside["stages"]
    speed = result["frames_per_second"]
    assert (
        speed["without_decoding"] == apart["frames_per_second"]["without_decoding"]
        and speed["with_decoding"] > 0
    )
    assert result["chunk"] == beside["chunk"] and result["gpu"] == "a GPU"
    tokens = Manifest.load(tiny_bundle).geometry.frame_tokens
    for (calls, chunks), figures, count in ((handed[0][2], beside, 6), (handed[0][3], apart, 3)):
        keys = [call.keys for call in calls if call.stage == "denoise"]
        assert chunks == count and np.mean(keys) == pytest.approx(figures["mean_window"] * tokens)


def test_a_gpus_rate_is_that_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty products are done at a clock that is gone after some milliseconds."""
    torch = pytest.importorskip("torch")

    class Cuda(limits.Gpu):
        def __init__(self) -> None:
            self._torch, self.device, self.name, self.repeats = torch, "cpu", "a GPU", list[int]()

        def _seconds(self, work: Any, repeats: int = 20) -> float:
            self.repeats.append(repeats)
            return 0.001 if repeats == 20 else 0.002

    monkeypatch.setattr(limits, "MATMUL", 64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 0))
    gpu = Cuda()
    made = gpu.limits("bf16")
    assert made is not None and gpu.repeats == [20, 1001, 20], "a second of products of a millisecond"
    assert made["first_gflop_per_s"] == pytest.approx(2 * made["gflop_per_s"])
    assert made["gflop_per_s"] == pytest.approx(2 * 64**3 / 0.002 / 1e9)
