"""What README.md and samples/ tell people to type is typed here."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import av
import pytest
import typer
from PIL import Image

from swiftvideo.runtime.pipeline import EMBEDDED
from swiftvideo.sdk.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.removeprefix("$ swiftvideo "))
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("$ swiftvideo ")
]
RUNNABLE = ("generate", "inspect", "doctor")
"""Commands that need no more than the embedded model; the others' options are checked, not run."""

embedded = pytest.mark.skipif(
    not (EMBEDDED / "manifest.json").is_file(), reason="this checkout holds no embedded model"
)


def run(*arguments: str, cwd: Path) -> str:
    """Run a program; what it printed."""
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@embedded
def test_the_six_lines_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    program = block + "\nprint(chunk.index, chunk.prompt, chunk.frames.shape)"
    printed = run(sys.executable, "-c", program, cwd=tmp_path)
    assert printed.strip() == "6 a yellow square moving up in the fog (12, 64, 64, 3)"


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_options_of_every_command_exist(arguments: list[str]) -> None:
    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


@embedded
@pytest.mark.parametrize(
    "arguments", [each for each in COMMANDS if each[0] in RUNNABLE and "--server" not in each], ids=" ".join
)
def test_commands_run(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    program = "import sys; from swiftvideo.sdk.cli import main; sys.argv[0] = 'swiftvideo'; main()"
    run(sys.executable, "-c", program, *arguments, cwd=tmp_path)
    written = [tmp_path / word for word in arguments if word.endswith((".mp4", ".png"))]
    for path in written:
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).width >= 64


@embedded
def test_the_sample_that_switches(tmp_path: Path) -> None:
    printed = run(sys.executable, str(ROOT / "samples/switch.py"), "a.mp4", cwd=tmp_path)
    lines = printed.splitlines()
    assert len(lines) == 12
    assert [number for number, line in enumerate(lines) if "rho" in line] == [4, 8]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9 + 11 * 12


@embedded
def test_the_sample_that_resumes(tmp_path: Path) -> None:
    assert "same to the byte" in run(sys.executable, str(ROOT / "samples/resume.py"), "s", cwd=tmp_path)


def ask(port: int, method: str, path: str, body: str | None = None) -> HTTPResponse:
    connection = HTTPConnection("localhost", port, timeout=60)
    connection.request(method, path, body)
    return connection.getresponse()


def events(stream: HTTPResponse) -> Iterator[tuple[str, Any]]:
    """Server-sent events: their names, and their data."""
    while line := stream.readline().decode():
        data = stream.readline().decode()
        assert stream.readline() == b"\n"
        yield line.removeprefix("event: ").strip(), json.loads(data.removeprefix("data: "))


@embedded
def test_the_sample_in_the_browser(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "samples/live.py"), "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            found = re.search(r"http://localhost:(\d+)", child.stdout.readline())
            assert found is not None
            port = int(found[1])
            assert b"new EventSource('/video?prompt='" in ask(port, "GET", "/").read()
            stream = ask(port, "GET", "/video?prompt=a%20red%20circle%20moving%20right%20at%20night")
            seen = events(stream)
            name, begin = next(seen)
            assert name == "begin" and (begin["width"], begin["height"]) == (64, 64)
            prompts = f"/prompt/{begin['session']}"
            refused = ask(port, "POST", prompts, "a red dog")
            assert refused.status == 400 and b"'dog'" in refused.read()
            assert ask(port, "POST", "/prompt/other", "a blue cross").status == 404
            assert ask(port, "POST", prompts, "a blue cross bouncing at dawn").status == 204
            chunks, frames = [], 0
            while not (chunks and chunks[-1]["mode"]):
                name, data = next(seen)
                if name == "chunk":
                    chunks.append(data)
                else:
                    frames += 1
                    picture = Image.open(io.BytesIO(base64.b64decode(data["jpeg"], validate=True)))
                    assert (picture.format, picture.size) == ("JPEG", (64, 64))
            assert len(chunks) in (2, 3) and frames == 9 + 12 * (len(chunks) - 2)
            assert chunks[-1]["prompt"] == "a blue cross bouncing at dawn" and 0 < chunks[-1]["rho"] <= 1
            other = list(events(ask(port, "GET", "/video?prompt=a%20red%20dog")))
            assert [name for name, _ in other] == ["failed"] and "'dog'" in other[0][1]["text"]
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=60) == 0
            assert {name for name, _ in seen} <= {"frame", "chunk"}
            stream.close()
        finally:
            child.kill()


def test_users_are_told_to_install_extras_that_exist_and_types_that_are_seen() -> None:
    """Type checkers do not follow the hook of an editable installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = [README, *((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("export", "service"))]
    told = [told for page in pages for told in re.findall(r"pip install ([^`\n]*)", page)]
    extras = {extra for each in told for extra in re.findall(r"\[(.*?)\]", each)}
    assert not [each for each in told if "-e" in each.split()]
    assert {"serve", "export"} <= extras <= set(project["optional-dependencies"])
