"""What was measured is kept, whatever comes after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from .record import Record  # noqa: E402


def test_a_failure_is_kept_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    record = Record(path, {"commit": "abc"})

    def fails() -> None:
        raise ValueError("no such kernel")

    assert record.add("stages", "first", work=lambda: 1.5) == 1.5
    assert json.loads(path.read_text())["stages"] == {"first": 1.5}, "written at once"
    assert record.add("stages", "second", work=fails) is None
    assert record.add("stages", "third", work=lambda: 2.5) == 2.5
    made: dict[str, Any] = json.loads(path.read_text())
    assert made["stages"]["first"] == 1.5 and made["stages"]["third"] == 2.5 and made["commit"] == "abc"
    assert "ValueError: no such kernel" in made["stages"]["second"]["error"]
    assert made["failed"] == record.failed == ["stages/second"]
    assert set(made["seconds"]) == {"stages/first", "stages/second", "stages/third"}
    assert '{"stages/first": 1.5}' in capsys.readouterr().out, "and printed"
    assert [child.name for child in tmp_path.iterdir()] == ["figures.json"]


def test_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    record = Record(path, {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        assert record.add("first", work=lambda: 1.5) == 1.5
    said = capsys.readouterr()
    assert '{"first": 1.5}' in said.out and "figures.json was not written" in said.err
    record.add("second", work=lambda: 2.5)
    assert json.loads(path.read_text())["first"] == 1.5


def test_without_a_file() -> None:
    assert Record(None, {}).add("x", work=lambda: 3) == 3
