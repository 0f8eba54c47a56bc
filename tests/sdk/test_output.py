"""Checks of the files that a command will write."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftvideo.runtime.errors import UsageError
from swiftvideo.sdk import output
from swiftvideo.sdk.output import OutputError, check_output


def test_outputs_that_cannot_be_written_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"mkdir -p .*absent"):
        check_output(tmp_path / "absent" / "a.mp4", (".mp4",))
    with pytest.raises(UsageError, match=r"\.mp4"):
        check_output(tmp_path / "a.avi", (".mp4",))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UsageError, match="folder"):
        check_output(tmp_path / "folder.mp4", (".mp4",))


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permissions"):
        check_output(tmp_path / "a.mp4", (".mp4",))
