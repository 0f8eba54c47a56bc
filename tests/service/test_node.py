"""The sample in JavaScript: a client from the .proto alone. Cut, its session has the bytes of one that was not cut."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.v1 import generation_pb2 as pb

from .harness import ServerProcess, proxied, reference

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples/node"
CHUNKS = 120


def node_modules(folder: Path) -> Path | None:
    """Where @grpc/grpc-js is: beside the sample, or freshly installed; None where it cannot be."""
    if (SAMPLE / "node_modules/@grpc/grpc-js").is_dir():
        return SAMPLE / "node_modules"
    npm = shutil.which("npm")
    if npm is None:
        return None
    shutil.copy(SAMPLE / "package.json", folder)
    command = [npm, "install", "--silent", "--no-audit", "--no-fund"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return folder / "node_modules"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").partition(".")[0]) < 20:
        pytest.skip(f"node is {version.strip()}, and the sample is for 20 and later")
    folder = tmp_path_factory.mktemp("node")
    modules = node_modules(folder)
    if modules is None:
        pytest.skip("npm cannot install @grpc/grpc-js here")
    shutil.copy(SAMPLE / "play.js", folder)
    if modules != folder / "node_modules":
        (folder / "node_modules").symlink_to(modules)
    return [node, str(folder / "play.js"), "--protos", str(ROOT / "protos")]


def until(lines: Iterator[str], text: str) -> Iterator[str]:
    """The lines up to the one that begins with a text."""
    for line in lines:
        yield line
        if line.startswith(text):
            return
    raise AssertionError(f"{text!r} did not come")


def test_a_session_with_prompts_and_cuts(
    server: ServerProcess, pipeline: Any, sample: list[str], tmp_path: Path
) -> None:
    out, seed = tmp_path / "frames.rgb", 2**64 - 3  # which a double does not hold
    with proxied(server.port) as (address, proxy, loop):
        command = [*sample, "--server", address, "--out", str(out), "--encoding", "raw"]
        command += ["--seed", str(seed), "--chunks", str(CHUNKS), "w1 w2", "w3 w4@3"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, text=True, **pipes) as child:
            try:
                assert child.stdin is not None and child.stdout is not None
                told = list(until(child.stdout, "chunk 1"))
                loop.call_soon_threadsafe(proxy.cut)
                told += until(child.stdout, "resumed")
                child.stdin.write("w8 nonsense\nw9 w10\n")
                child.stdin.flush()
                told += until(child.stdout, "accepted")
                loop.call_soon_threadsafe(proxy.cut)
                told += child.stdout
            finally:
                child.kill()
    report = "".join(told)
    assert f"all {CHUNKS} chunks were presented" in told[-1] and proxy.cuts == 2, report
    assert sum(line.startswith("chunk ") for line in told) == CHUNKS, report
    assert "does not know 'nonsense'" in report and report.count("switches to") == 2
    heard = int(re.findall(r'accepted "w9 w10", heard with chunk (\d+)', report)[-1])
    ahead = pb.Prompt(text="w3 w4", at_chunk=3)
    expected = reference(pipeline, seed, CHUNKS, [ahead, pb.Prompt(text="w9 w10", heard_chunk=heard)])
    assert out.read_bytes() == b"".join(expected), report


def test_what_a_server_refuses_is_told(server: ServerProcess, sample: list[str], tmp_path: Path) -> None:
    command = [*sample, "--server", server.address, "--out", str(tmp_path / "x"), "nonsense"]
    refused = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert refused.returncode == 1 and refused.stderr == ""
    assert refused.stdout.startswith("INVALID_ARGUMENT: this model does not know 'nonsense'")


def test_it_comes_again_when_a_full_server_says(
    small_bundle: Path, sample: list[str], tmp_path: Path
) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ServerProcess(small_bundle, "--max-sessions", "1", "--max-load", "0") as running:
        command = [*sample, "--server", running.address, "--out", str(tmp_path / "x"), "w1", "--chunks"]
        with subprocess.Popen([*command, "0"], text=True, **pipes) as endless:
            try:
                assert endless.stdout is not None
                list(until(endless.stdout, "chunk 0"))
                with subprocess.Popen([*command, "2"], text=True, **pipes) as second:
                    try:
                        assert second.stdout is not None
                        (waits,) = until(second.stdout, "RESOURCE_EXHAUSTED")
                        assert re.search(r"the server holds 1 sessions.*again in \d+ ms$", waits)
                        endless.send_signal(signal.SIGINT)
                        assert endless.stdout.read().endswith("the client asked for it\n")
                        assert second.stdout.read().endswith("all 2 chunks were presented\n")
                    finally:
                        second.kill()
            finally:
                endless.kill()
    assert (endless.returncode, second.returncode) == (0, 0)
