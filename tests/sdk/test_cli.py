"""The command line, in this process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from swiftvideo.runtime import Manifest, pipeline as runtime_pipeline
from swiftvideo.runtime.plugins.plans import PlanInfo
from swiftvideo.sdk import bench, cli
from tests.sdk.commands import BLUE, RED, YELLOW, failed, run, video


def test_generate_makes_a_video_of_several_prompts(
    tiny_bundle: Path, options: list[object], tmp_path: Path
) -> None:
    out, sheet = tmp_path / "story.mp4", tmp_path / "sheet.png"
    result = run(
        *("generate", "--prompt", RED, "--at", "1s", "--prompt", YELLOW, "--at", "2000ms", "--prompt", BLUE),
        *("--seconds", 3, "--seed", 7, "--out", out, "--contact-sheet", sheet, *options),
    )
    assert result.exit_code == 0
    g = Manifest.load(tiny_bundle).geometry
    assert video(out) == (3 * g.fps, g.fps, (g.width, g.height))
    lines = result.stdout.splitlines()
    assert YELLOW in lines[0] and "asked for at 1 s" in lines[0] and BLUE in lines[1]
    assert f"{out}: {3 * g.fps} frames, 3.00 s at {g.fps} fps" in lines[2] and "frames per second" in lines[2]
    assert lines[3] == f"{sheet}: contact sheet"
    with Image.open(sheet) as image:
        assert image.height > 3 * 112 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_generate_tells_machines_everything(tiny_bundle: Path, options: list[object], tmp_path: Path) -> None:
    story, out = tmp_path / "story.yaml", tmp_path / "story.mp4"
    story.write_text(
        f"seconds: 2\nseed: 3\npolicy: recache\nprompts:\n  - prompt: {RED}\n  - prompt: {BLUE}\n    at: 1s\n"
    )
    result = run("generate", "--story", story, "--out", out, "--json", *options)
    report = json.loads(result.stdout)
    g = Manifest.load(tiny_bundle).geometry
    assert result.exit_code == 0 and not result.stderr
    assert (report["frames"], report["frames_planned"], report["seconds"]) == (2 * g.fps, 2 * g.fps, 2.0)
    assert (report["seed"], report["policy"], report["engine"]) == (3, "recache", "onnxruntime")
    assert (report["width"], report["height"], report["fps"]) == (g.width, g.height, g.fps)
    assert report["video"] == str(out) and report["contact_sheet"] is None and not report["interrupted"]
    (switch,) = report["switches"]
    assert (switch["prompt"], switch["asked"], switch["mode"]) == (BLUE, 1.0, "full-recache")
    assert switch["frame"] == 21 and switch["shown"] == 21 / g.fps and 0 <= switch["rho"] <= 1
    assert report["windows"] == [g.window] * 3 and report["frames_per_second"] > 0
    assert video(out)[0] == 2 * g.fps


def test_options_override_a_story(tiny_bundle: Path, options: list[object], tmp_path: Path) -> None:
    story, out = tmp_path / "story.yaml", tmp_path / "story.mp4"
    story.write_text(f"seconds: 9\nseed: 3\nprompts:\n  - prompt: {RED}\n")
    fps = Manifest.load(tiny_bundle).geometry.fps
    arguments = ("generate", "--story", story, "--out", out, "--json", "--seconds", "0.5s", *options)
    report = json.loads(run(*arguments, "--seed", 5, "--policy", "keep").stdout)
    assert (report["frames"], report["seed"], report["policy"]) == (fps // 2, 5, "keep")


def test_the_same_seed_writes_the_same_frames(options: list[object], tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        arguments = ("--prompt", RED, "--seconds", "0.5", "--out", tmp_path / f"{name}.mp4", "--json")
        run("generate", *arguments, "--seed", seed, *options)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", RED, "--at", "soon", "--prompt", BLUE], 2, "time 'soon': write it like 4s, 1m30s"),
        (["--prompt", RED, "--prompt", BLUE], 2, "2 --prompt and 0 --at"),
        (
            ["--prompt", RED, "--seconds", "0"],
            2,
            "seconds is 0: it must be above 0 and at most 31622400, a year",
        ),
        (
            ["--prompt", RED, "--at", "5s", "--prompt", BLUE, "--seconds", "4"],
            2,
            "raise seconds or start it earlier",
        ),
        (["--prompt", RED, "--seed", "-1"], 2, "seed is -1"),
        (["--prompt", RED, "--policy", "guess"], 2, "policy is 'guess': use one of swift"),
        (["--prompt", RED, "--engine", "quantum"], 2, "engine is 'quantum': use"),
        (["--prompt", RED, "--engine", "tensorrt"], 1, "use engine='onnxruntime'"),
        (["--prompt", "a purple zebra"], 2, "this model does not know 'zebra'"),
        (["--prompt", "red " * 300], 2, "tokens and the model takes"),
        (["--prompt", " "], 2, "is empty: say what to show"),
        ([], 2, "nothing to show: give --prompt or --story"),
        (["--story", "x.yaml", "--prompt", RED], 2, "use either the file or the options"),
        (["--story", "no.yaml"], 2, "story 'no.yaml' cannot be read"),
        (["--prompt", RED, "--bundle", "no-bundle"], 1, "no bundle at 'no-bundle'"),
        (["--prompt", RED, "--out", "film.avi"], 2, "the name must end in .mp4"),
        (["--prompt", RED, "--out", "no/film.mp4"], 1, "folder 'no' is not there: make it first"),
        (["--prompt", RED, "--contact-sheet", "s.jpg"], 2, "the name must end in .png"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[object],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", tmp_path / "x.mp4"]
    bundle = options if "--bundle" not in arguments else options[2:]
    got, text = failed(capfd, monkeypatch, "generate", *arguments, *out, *bundle)
    assert got == code and message in text
    assert text.startswith("swiftvideo: ") and text.count("\n") == 1 and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_json_where_that_was_asked_for(options: list[object], tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app,
        [
            str(item)
            for item in ("generate", "--prompt", "zebra", "--out", tmp_path / "x.mp4", "--json", *options)
        ],
    )
    assert result.exit_code != 0
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "PromptError" and "'zebra'" in error["message"]


def test_a_changed_bundle_is_refused(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes().replace(b"red", b"rad"))
    arguments = ("generate", "--prompt", RED, "--out", tmp_path / "x.mp4", "--bundle", bundle)
    code, text = failed(capfd, monkeypatch, *arguments)
    assert code == 1 and "tokenizer.json was changed" in text and text.count("\n") == 1


def test_the_bar_tells_the_time_in_80_columns(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = ("--prompt", RED, "--at", "1s", "--prompt", YELLOW, "--seconds", "2.5", "--policy", "recache")
    result = run("generate", *given, "--out", tmp_path / "x.mp4", *options)
    assert re.search(r"^a yell.*… .* 30/30 frames .* full-recache 0:00:\d\d$", result.stderr, re.M), (
        result.stderr
    )


def test_one_frame_is_no_frames(options: list[object], tmp_path: Path) -> None:
    result = run("generate", "--prompt", RED, "--seconds", "0.01", "--out", tmp_path / "x.mp4", *options)
    assert "x.mp4: 1 frame, 0.08 s" in result.stdout


# -- the other commands ------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_in_a_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run("inspect", tiny_bundle)
    manifest = Manifest.load(tiny_bundle)
    g = manifest.geometry
    assert result.exit_code == 0
    for text in (
        manifest.model,
        f"{g.width}x{g.height}, {g.fps} fps, 12 frames a chunk",
        f"{g.layers} layers, width {g.dim}, {g.heads} heads; 4 steps",
        f"window {g.window}, sink {g.sink}, {g.max_anchors} anchors",
        "1000, 937.5, 833.333, 625",
        manifest.text_encoder,
        manifest.source.sha256[:16],
    ):
        assert text in result.stdout
    for name, entry in manifest.files.items():
        assert f"{entry.sha256[:16]}" in result.stdout and name in result.stdout


def test_inspect_shows_names_as_they_are(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "[red]x"))
    data = json.loads((tiny_bundle / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, "model": "toy[bold] of [/] all"}))
    result = run("inspect", folder)
    assert "toy[bold] of [/] all" in result.stdout
    assert "[red]x" in "".join(result.stdout.split()), "however the path is wrapped"


def hostile(tiny_bundle: Path, folder: Path, **values: object) -> Path:
    shutil.copytree(tiny_bundle, folder)
    data = json.loads((tiny_bundle / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, **values}))
    return folder


def test_what_a_bundle_says_moves_no_cursor(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile(tiny_bundle, tmp_path / "x", model="a\x1b[2Jb\rc\x9bd", text_encoder="\x1b]0;title\x07")
    shown = run("inspect", folder).stdout
    assert r"a\x1b[2Jb\rc\x9bd" in shown and r"\x1b]0;title\x07" in shown
    bad = hostile(tiny_bundle, tmp_path / "y\x1b[2J", schema=2)
    code, text = failed(capfd, monkeypatch, "inspect", bad)
    assert code == 1 and r"y\x1b[2J" in text and "\x1b" not in shown + text


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"flavour": ["tensorrt"]},
        {"file": {}, "flavour": "tensorrt"},
        {"file": "x", "flavour": "other\x1b[2J"},
    ],
)
def test_inspect_of_plans_that_are_none(
    tiny_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    plan: dict[str, object],
) -> None:
    whole = dict.fromkeys(("graph", "target", "version", "dtype", "file", "layers", "source", "flavour"), "x")
    entry = {**whole, "capability": 90, "plugins": {}, **plan} if plan else {}
    code, text = failed(capfd, monkeypatch, "inspect", hostile(tiny_bundle, tmp_path / "x", plans=[entry]))
    assert code == 1 and text.count("\n") == 1 and "the manifest's plan" in text and "\x1b" not in text


@pytest.mark.parametrize("report", ["[", "[]", "{}", '{"layers": [{}], "bindings": []}', "[" * 100_000])
def test_inspect_of_a_report_that_is_none(
    tiny_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    report: str,
) -> None:
    plan = PlanInfo("decode", "h100", "tensorrt", "1", 90, "fp32", "tokenizer.json", "trt/x.json", "", {})
    files = json.loads((tiny_bundle / "manifest.json").read_text())["files"]
    files["trt/x.json"] = {"sha256": hashlib.sha256(report.encode()).hexdigest(), "size": len(report)}
    folder = hostile(tiny_bundle, tmp_path / "x", plans=[plan.entry()], files=files)
    (folder / "trt").mkdir()
    (folder / "trt/x.json").write_text(report)
    code, text = failed(capfd, monkeypatch, "inspect", folder)
    assert code == 1 and "trt/x.json is no report of a plan's layers" in text and text.count("\n") == 1


def test_memory_that_is_missing_is_a_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def app() -> None:
        raise MemoryError("Unable to allocate 8 EiB")

    monkeypatch.setattr(cli, "app", app)
    assert failed(capfd, monkeypatch) == (
        1,
        "swiftvideo: no memory (Unable to allocate 8 EiB): use a smaller model or resolution\n",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Path.unlink, "is listed in the manifest and not there"),
        (lambda path: path.write_bytes(b"short"), "does not have the"),
    ],
)
def test_inspect_of_a_bundle_that_is_not_whole(
    tiny_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    said: str,
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))
    change(folder / "onnx" / "decode.onnx")
    code, text = failed(capfd, monkeypatch, "inspect", folder)
    assert code == 1 and text.startswith(f"swiftvideo: {folder / 'onnx' / 'decode.onnx'} {said}")


def test_inspect_of_nothing_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = failed(capfd, monkeypatch, "inspect", tmp_path)
    assert code == 1 and text.startswith("swiftvideo: no bundle at") and text.count("\n") == 1


def test_doctor_says_what_runs_here(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swiftvideo.sdk import doctor

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(runtime_pipeline, "EMBEDDED", tiny_bundle)
    result = run("doctor")
    lines = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert result.exit_code == 0
    for name in ("engine onnxruntime", "video", "embedded model"):
        assert " yes " in lines[name]
    assert Manifest.load(tiny_bundle).model in lines["embedded model"]
    assert " no " in lines["engine tensorrt"]
    monkeypatch.setattr(runtime_pipeline, "EMBEDDED", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    monkeypatch.delitem(sys.modules, "swiftvideo.sdk.video", raising=False)
    monkeypatch.setitem(sys.modules, "av", None)
    out = run("doctor").stdout
    assert "pip install av" in out
    assert "no bundle at" in out
    assert len(re.findall(r"torch.* not installed: pip install 'swiftvideo\[export\]'", out)) == 2
    assert "engine torch" in out


def test_version_and_help_and_wrong_usage() -> None:
    assert run("--version").stdout.startswith("swiftvideo ")
    assert "generate" in run("--help").stdout
    for arguments in (["generate"], ["bench", "--chunks", "1"], ["dance"]):
        result = run(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output


def test_bench_prints_stages_speed_switches_and_memory(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in (("BETWEEN", 2), ("SWITCHES", 2), ("MEMORY_FROM", 3)):
        monkeypatch.setattr(bench, name, value)
    path = tmp_path / "bench.json"
    result = run(
        "bench", "--chunks", 8, "--memory-chunks", 6, "--policy", "recache", "--json", path, *options
    )
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for stage in ("denoise", "commit", "decode", "inject", "recache", "rest"):
        assert any(line.strip().startswith(stage) and line.rstrip().endswith("%") for line in lines), stage
    assert any("frames per second with the VAE" in line for line in lines)
    assert any(line.startswith("switch, full-recache: ") for line in lines)
    assert any(line.startswith("peak memory ") and "after chunk 3" in line for line in lines)
    figures: dict[str, Any] = json.loads(path.read_text())
    assert sum(row["share"] for row in figures["stages"].values()) == pytest.approx(1, abs=0.01)
    assert figures["stages"]["recache"]["share"] == 0 < figures["stages"]["decode"]["share"]
    speed = figures["frames_per_second"]
    assert 0 < speed["with_decoding"] < speed["without_decoding"]
    assert [row["chunk"] for row in figures["memory_mib"]] == [3, 6]
    assert (
        figures["switch"]["full-recache"]["count"] == 2 and figures["switch"]["full-recache"]["recache"] > 0
    )
    assert figures["threads"] == 1 and figures["chunks"] == 8 and figures["versions"]["onnxruntime"]
    assert figures["memory_mib"][1]["peak"] >= figures["memory_mib"][0]["peak"] > 10


def test_bench_refuses_before_it_measures(
    options: list[object], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        (("--json", tmp_path / "x.txt"), "must end in .json"),
        (("--memory-chunks", 20), "20 chunks for memory: use 0, or more than 20"),
    ):
        code, text = failed(capfd, monkeypatch, "bench", *arguments, *options)
        assert code == 2 and message in text and text.count("\n") == 1


def test_steady_figures_are_sums_of_what_was_measured() -> None:
    class Fake:
        def __init__(self, seconds: float) -> None:
            self.frames, self.window = np.zeros((12, 2, 2, 3), np.uint8), 8
            self.timings = {"denoise": seconds / 2, "decode": seconds / 4}

    figures = bench.steady_figures([(Fake(s), s) for s in (1.0, 3.0)])  # type: ignore[misc]
    assert figures["frames_per_second"] == {"with_decoding": 6.0, "without_decoding": 8.0}
    assert figures["stages"]["denoise"] == {"median": 1000.0, "p99": 1490.0, "share": 0.5}
    assert figures["stages"]["rest"]["share"] == 0.25 and figures["mean_window"] == 8.0
