"""Where a bundle may be written, and that the old one stays until the new one is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.export.destination import BundleWriteError, check_destination, put_in_place, work_folder
from swiftvideo.runtime.errors import SettingsError

MANIFEST = {"schema": 1, "geometry": {}, "files": {"onnx/a.onnx": {}}}


def bundle(folder: Path, **changes: object) -> Path:
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "a.onnx").write_text("a")
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **changes}))
    return folder


def refused(out: Path | str, match: str, overwrite: bool = True) -> None:
    with pytest.raises(SettingsError, match=match):
        check_destination(out, overwrite)


def test_a_bundle_of_any_version_is_replaceable(tmp_path: Path) -> None:
    for schema in (0, 1, 7):
        out = bundle(tmp_path / str(schema), schema=schema, later="x")
        refused(out, "--overwrite", overwrite=False)
        assert check_destination(out, overwrite=True) == out


@pytest.mark.parametrize(
    "content",
    [
        '{"manifest_version": 3, "name": "a browser extension"}',
        '{"schema": 1, "files": {"a": 1}}',
        '{"schema": 1, "files": ["a"], "geometry": {}}',
        '{"schema": "1", "files": {}, "geometry": {}}',
        "[]",
        "no JSON",
        "",
    ],
)
def test_another_manifest_makes_no_bundle(tmp_path: Path, content: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_text(content)
    refused(tmp_path / "x", "holds no bundle")


@pytest.mark.parametrize(
    "name", ["notes.txt", "onnx/a.onnx.bak", ".git/HEAD", "trt/notes.txt", "kernels/x.cu"]
)
def test_what_the_manifest_does_not_list_is_kept(tmp_path: Path, name: str) -> None:
    out = bundle(tmp_path / "b")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("work")
    refused(out, f"holds {name}, which its manifest does not list")


def test_a_link_to_a_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    out = bundle(tmp_path / "b")
    (out / "elsewhere").symlink_to(tmp_path)
    refused(out, "holds elsewhere")


def test_what_building_plans_or_macos_left_is_replaceable(tmp_path: Path) -> None:
    out = bundle(tmp_path / "b")
    left = (".plans-x/trt/rtx-sm89/a.plan", "trt/rtx-sm89/a.plan", "trt/rtx-sm89/a.layers.json")
    finder = (".DS_Store", "onnx/.DS_Store")
    for name in (*left, *finder, "kernels/k.cubin", "kernels/k.json", "manifest.json.partial"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    assert check_destination(out, overwrite=True) == out


def test_links_are_followed(tmp_path: Path) -> None:
    real, empty = bundle(tmp_path / "real"), tmp_path / "empty"
    empty.mkdir()
    for name, target in (("a", real), ("b", empty), ("c", tmp_path / "absent")):
        (tmp_path / name).symlink_to(target)
        assert check_destination(tmp_path / name, overwrite=True) == target
    (tmp_path / "round").symlink_to(tmp_path / "round")
    refused(tmp_path / "round", "leads nowhere")


def test_places_where_no_folder_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "file" / "x" / "y", f"{tmp_path / 'file'} is a file")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", "..", tmp_path / "here"):
        refused(name, "current folder, which cannot be replaced: choose a folder inside it")
    assert check_destination("new") == tmp_path / "here" / "below" / "new"
    refused("/", "mount point, which cannot be replaced: choose a folder inside it")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(tmp_path / "new" / "deep", f"{tmp_path} cannot be written: change its permissions")


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path: Path) -> None:
    """Also where only the hidden folder's would be."""
    for name in ("a" * 300, "a" * 245):
        refused(tmp_path / name, "File name too long.*choose another folder")
        refused(tmp_path / "new" / name, "File name too long.*choose another folder")
    with work_folder(check_destination(tmp_path / ("a" * 241))) as work:
        bundle(work)
        put_in_place(work, tmp_path / ("a" * 241))


def test_the_old_bundle_goes_when_the_new_one_is_there(tmp_path: Path) -> None:
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    put_in_place(work, out, overwrite=True)
    assert "new" in (out / "manifest.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def failing(monkeypatch: pytest.MonkeyPatch, work: Path, out: Path, error: BaseException) -> None:
    """Let the renaming of `work` to `out` fail."""
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if (path, target) == (work, out):
            assert not out.exists()
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)


def test_the_old_bundle_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    failing(monkeypatch, work, out, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        put_in_place(work, out, overwrite=True)
    assert json.loads((out / "manifest.json").read_text()) == MANIFEST
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b-work", "b"]


def test_the_old_bundle_stays_where_the_disk_cannot_say_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a while: the new bundle is not gone, though asking for it is an error."""
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    failing(monkeypatch, work, out, OSError(5, "bad disk"))

    def ask(real: Callable[..., os.stat_result], path: object, **options: Any) -> os.stat_result:
        if path == work:
            raise OSError(5, "bad disk")
        return real(path, **options)

    for name in ("stat", "lstat"):  # of these two, other versions of Python use the other one
        monkeypatch.setattr(os, name, partial(ask, getattr(os, name)))
    with pytest.raises(
        BundleWriteError, match=rf"bad disk.*what {out} was is {tmp_path / 'b-work-old'}: move"
    ):
        put_in_place(work, out, overwrite=True)
    monkeypatch.undo()
    assert json.loads((tmp_path / "b-work-old" / "manifest.json").read_text()) == MANIFEST
    assert "new" in (tmp_path / "b-work" / "manifest.json").read_text()


def test_the_finished_bundle_stays_where_it_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    failing(monkeypatch, work, out, OSError(16, "busy"))
    with pytest.raises(BundleWriteError, match=rf"busy.*the finished bundle is {tmp_path / 'b-work'}: move"):
        put_in_place(work, out, overwrite=True)
    assert json.loads((out / "manifest.json").read_text()) == MANIFEST
    assert "new" in (tmp_path / "b-work" / "manifest.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b-work"]


def test_what_appears_between_the_two_renames_stays_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    rename = Path.rename

    def crowded(path: Path, target: Path) -> Path:
        if path == work and target == out:
            out.mkdir()
            (out / "notes").write_text("work")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crowded)
    with pytest.raises(BundleWriteError, match=rf"what {out} was is {tmp_path / 'b-work-old'}: move"):
        put_in_place(work, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["notes"]
    assert json.loads((tmp_path / "b-work-old" / "manifest.json").read_text()) == MANIFEST
    assert "new" in (tmp_path / "b-work" / "manifest.json").read_text()


def test_a_link_that_appears_is_not_followed(tmp_path: Path) -> None:
    real, work, out = bundle(tmp_path / "real"), bundle(tmp_path / ".b-work"), tmp_path / "b"
    out.symlink_to(real)
    with pytest.raises(BundleWriteError, match="is a link now"):
        put_in_place(work, out, overwrite=True)
    assert out.is_symlink() and json.loads((real / "manifest.json").read_text()) == MANIFEST


def unfinished(folder: Path, name: str = "onnx/decode.onnx") -> Path:
    """What a killed export leaves."""
    (folder / "onnx").mkdir(parents=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("a")
    return folder


def test_what_killed_exports_left_goes_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "b[1]"
    unfinished(tmp_path / ".b[1]-abcd_123")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".b[1]-link1234").symlink_to(unfinished(tmp_path / "elsewhere" / "x"))
    (tmp_path / ".b[1]-file1234").write_text("a")
    (tmp_path / ".b[1]-fresh123").mkdir()  # about to be locked
    others = [
        unfinished(tmp_path / ".b[1]-abcd_1234"),
        unfinished(tmp_path / ".b[1]-abcd_123-old"),
        unfinished(tmp_path / ".b1-abcd_123"),
        unfinished(tmp_path / ".b[1]-finished", "manifest.json"),
        unfinished(tmp_path / ".b[1]-somebody", "onnx/notes.txt"),
        unfinished(tmp_path / ".b[1]-original", "onnx/unet.onnx"),
    ]
    before = set(tmp_path.iterdir())
    with work_folder(place) as work:
        assert set(tmp_path.iterdir()) == before - {tmp_path / ".b[1]-abcd_123"} | {work}
    assert all((folder / "onnx").is_dir() for folder in others)
    assert (tmp_path / "elsewhere" / "x" / "onnx" / "decode.onnx").exists()


def test_an_export_that_still_runs_keeps_its_folder(tmp_path: Path) -> None:
    with work_folder(tmp_path / "b") as first:
        unfinished(first)
        with work_folder(tmp_path / "b"):
            assert (first / "onnx" / "decode.onnx").exists()
    with work_folder(tmp_path / "b"):  # as if it had been killed
        assert not first.exists()
