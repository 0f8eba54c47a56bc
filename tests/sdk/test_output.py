"""Checks of the files that a command will write."""

from __future__ import annotations

import os
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


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="a pipe or a device"):
        check_output(tmp_path / "a.mp4", (".mp4",))
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(OutputError, match="choose another name"):
            check_output(tmp_path / f"{name}.mp4", (".mp4",))


def test_a_link_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "a.mp4"
    link.symlink_to(tmp_path / "nowhere" / "b.mp4")
    with pytest.raises(OutputError, match=r"nowhere' is not there: make it first"):
        check_output(link, (".mp4",))
    (tmp_path / "nowhere").mkdir()
    assert check_output(link, (".mp4",)) == link


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permissions"):
        check_output(tmp_path / "a.mp4", (".mp4",))
