"""The command as a process: signals, full disks, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiftvideo.runtime import Manifest
from tests.interrupting import interrupted
from tests.sdk.commands import BLUE, COMMAND, RED, video


def process(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_prints_progress_and_the_outcome(
    tiny_bundle: Path, options: list[object], tmp_path: Path
) -> None:
    child = process("generate", "--prompt", RED, "--seconds", 1, "--out", "x.mp4", *options, cwd=tmp_path)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    fps = Manifest.load(tiny_bundle).geometry.fps
    assert f"{fps}/{fps} frames" in err and "fps  window " in err
    assert out.startswith(f"x.mp4: {fps} frames, 1.00 s at {fps} fps")
    assert video(tmp_path / "x.mp4")[0] == fps


def test_a_process_fails_without_a_traceback(tmp_path: Path) -> None:
    child = process("generate", "--prompt", "x", "--out", "x.mp4", "--bundle", "nowhere", cwd=tmp_path)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 1 and not out
    assert err.startswith("swiftvideo: no bundle at 'nowhere'") and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_keeps_what_was_made(
    options: list[object], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "x.mp4"
    child = process(
        *("generate", "--prompt", RED, "--at", "1s", "--prompt", BLUE, "--seconds", 600, "--out", out),
        *("--contact-sheet", tmp_path / "x.png", "--json", *options),
        cwd=tmp_path,
    )
    told, err = interrupted(child, number, lambda: out.exists() and out.stat().st_size > 2000, within=300)
    assert child.returncode == 128 + number and "Traceback" not in err
    report = json.loads(told)
    assert report["interrupted"] and 0 < report["frames"] < report["frames_planned"] == 600 * report["fps"]
    assert video(out) == (report["frames"], report["fps"], (report["width"], report["height"]))
    assert report["contact_sheet"] == str(tmp_path / "x.png") and (tmp_path / "x.png").stat().st_size > 0


INTERRUPTING = """
import os, sys
from swiftvideo.sdk.entry import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)

number, module = int(sys.argv.pop()), sys.argv.pop()
sys.meta_path.insert(0, Finder())
main()
"""


def interrupted_at_import(module: str, number: signal.Signals, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that gets a signal as it begins to import `module`."""
    command = [sys.executable, "-c", INTERRUPTING, *map(str, arguments), module, str(int(number))]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    return child.returncode, child.stdout, child.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_command_is_loaded_ends_it_silently(number: signal.Signals) -> None:
    assert interrupted_at_import("typer", number, "doctor") == (-number, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_model_is_loaded_is_said(
    options: list[object], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "x.mp4"
    given = ("onnxruntime", number, "generate", "--prompt", RED, "--out", out, *options)
    assert interrupted_at_import(*given) == (128 + number, "", "interrupted: nothing was made yet\n")
    code, told, err = interrupted_at_import(*given, "--json")
    assert (code, err, out.exists()) == (128 + number, "", False)
    said = {"type": "KeyboardInterrupt", "message": "interrupted: nothing was made yet"}
    assert json.loads(told) == {"error": said}


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from swiftvideo.sdk.cli import main
main()
"""


def test_a_disk_that_is_full_is_said_with_what_is_kept(options: list[object], tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    given = ("generate", "--prompt", RED, "--seconds", 60, "--json", "--out", out, *options)
    command = [sys.executable, "-c", FULL, *map(str, given)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    kept, error = child.stderr.splitlines()
    assert child.returncode == 1 and error.startswith(f"swiftvideo: '{out}': writing failed, ")
    assert re.fullmatch(rf"what was made before, about \d+ frames, is in {out}", kept)
    assert "writing failed" in json.loads(child.stdout)["error"]["message"]


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, options: list[object]) -> None:
    given = ("generate", "--prompt", RED, "--seconds", 4, "--out", tmp_path / "x.mp4", *options)
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a child inherits that, as a shell's background jobs do
    try:
        child = process(*given, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while child.poll() is None:
            child.send_signal(signal.SIGINT)
            time.sleep(0.05)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 0 and video(tmp_path / "x.mp4")[0] > 40


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_said_is_one_sentence(tmp_path: Path, options: list[object]) -> None:
    given = ("generate", "--prompt", RED, "--seconds", 1, "--out", tmp_path / "x.mp4", "--json", *options)
    with Path("/dev/full").open("w") as full:
        command = [*COMMAND, *map(str, given)]
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert child.returncode == 1
    assert child.stderr == "swiftvideo: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "code"), [(("inspect", "nowhere"), 1), (("generate", "--out", "x.mp4"), 2)]
)
def test_an_error_that_cannot_be_said_has_its_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    with Path("/dev/full").open("w") as full:
        child = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, stdout=full, stderr=full, check=False)
    assert child.returncode == code


def test_an_error_is_said_where_nobody_listens_to_stdout(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        f"import os; os.close(1); os.execv({sys.executable!r}, {[*COMMAND, 'inspect', 'nowhere']!r})",
    ]
    child = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert child.returncode == 1 and child.stderr.startswith("swiftvideo: ")
