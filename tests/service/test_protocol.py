"""The .proto: style, compatibility, generated code, documentation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swiftvideo.runtime.telemetry import STAGES
from swiftvideo.sdk.protocol import MAX_ID, MAX_PROMPTS, MAX_REQUEST, MAX_TEXT
from swiftvideo.v1 import generation_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")


@pytest.mark.skipif(BUF is None, reason="buf is not installed (pip install buf-bin)")
@pytest.mark.parametrize("arguments", [["lint"], ["breaking", "--against", "baseline.binpb"]])
def test_buf_has_nothing_to_say(arguments: list[str], tmp_path: Path) -> None:
    assert BUF is not None
    result = subprocess.run([BUF, *arguments], cwd=PROTOS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(BUF is None, reason="buf is not installed (pip install buf-bin)")
def test_a_breaking_change_is_seen(tmp_path: Path) -> None:
    assert BUF is not None
    shutil.copytree(PROTOS, tmp_path / "protos")
    path = tmp_path / "protos/swiftvideo/v1/generation.proto"
    path.write_text(path.read_text().replace("uint64 presented_chunk = 1;", "uint64 presented_chunk = 2;"))
    command = [BUF, "breaking", "--against", "baseline.binpb"]
    result = subprocess.run(command, cwd=tmp_path / "protos", capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "presented_chunk" in result.stdout


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs]
    subprocess.run([*command, str(PROTOS / "swiftvideo/v1/generation.proto")], check=True)
    made = sorted((tmp_path / "swiftvideo/v1").iterdir())
    assert len(made) == 3
    for path in made:
        committed = PROTOS / "swiftvideo/v1" / path.name
        assert committed.read_text() == path.read_text(), f"{path.name} is out of date: run 'make proto'"


def test_every_message_field_and_value_is_documented() -> None:
    lines = (PROTOS / "swiftvideo/v1/generation.proto").read_text().splitlines()
    for number, line in enumerate(lines):
        text = line.strip()
        declares = text.startswith(("message ", "enum ", "service ", "rpc ", "oneof "))
        if declares or (text.endswith(";") and "=" in text and not text.startswith(("//", "syntax"))):
            assert lines[number - 1].strip().startswith("//"), f"line {number + 1} has no comment: {text}"


def test_the_calls_are_those_that_were_promised() -> None:
    service = pb.DESCRIPTOR.services_by_name["GenerationService"]
    assert [method.name for method in service.methods] == [
        "Generate",
        "Describe",
        "ListSessions",
        "StopSession",
    ]


def test_the_stages_are_those_of_the_runtime() -> None:
    text = (PROTOS / "swiftvideo/v1/generation.proto").read_text()
    stages = ", ".join(f'"{stage}"' for stage in STAGES)
    assert f"// Of the engine's stages: {stages}.\n" in text


def test_the_largest_reattach_fits_into_a_request() -> None:
    prompt = pb.Prompt(id="i" * MAX_ID, text="t" * MAX_TEXT, at_chunk=2**64 - 1, heard_chunk=2**64 - 1)
    largest = pb.Reattach(resume_token="r" * 1024, next_chunk=2**64 - 1, prompts=[prompt] * MAX_PROMPTS)
    assert pb.GenerateRequest(reattach=largest).ByteSize() < MAX_REQUEST
    text = (PROTOS / "swiftvideo/v1/generation.proto").read_text()
    for limit in (f"{MAX_REQUEST // 1024} KiB", f"at most {MAX_PROMPTS},", f"at most {MAX_TEXT} bytes"):
        assert limit in text


def test_there_are_options_for_languages_that_want_them() -> None:
    """Without go_package protoc-gen-go makes nothing; without the other one all of Java's messages are in one class."""
    options = pb.DESCRIPTOR.GetOptions()
    path, _, name = options.go_package.partition(";")
    assert path == "swiftvideo/v1" and name == "swiftvideov1" and options.java_multiple_files
