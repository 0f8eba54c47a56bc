"""Running the command in this process, and what it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner, Result

from swiftvideo.sdk import cli

RED, YELLOW, BLUE = (
    "a red circle moving right at night",
    "a yellow square moving up in the fog",
    "a blue triangle bouncing at dawn",
)
COMMAND = [sys.executable, "-c", "from swiftvideo.sdk.cli import main; main()"]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(item) for item in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def failed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str]:
    """Exit code and stderr of the entry point."""
    monkeypatch.setattr(sys, "argv", ["swiftvideo", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code, capfd.readouterr().err


def video(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Frames that decode, frames per second, width and height."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        count = sum(1 for _ in container.decode(video=0))
        assert stream.average_rate is not None
        return count, float(stream.average_rate), (stream.width, stream.height)
