"""Where a bundle may be written, and that the old one stays until the new one is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from swiftvideo.export.destination import check_destination, put_in_place
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


def test_what_building_plans_left_is_replaceable(tmp_path: Path) -> None:
    out = bundle(tmp_path / "b")
    left = (".plans-x/trt/rtx-sm89/a.plan", "trt/rtx-sm89/a.plan", "trt/rtx-sm89/a.layers.json")
    for name in (*left, "kernels/k.cubin", "kernels/k.json", "manifest.json.partial"):
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
    refused("/proc", "mount point, which cannot be replaced: choose a folder inside it")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(tmp_path / "new" / "deep", f"{tmp_path} cannot be written: change its permissions")


def test_the_old_bundle_goes_when_the_new_one_is_there(tmp_path: Path) -> None:
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    put_in_place(work, out)
    assert "new" in (out / "manifest.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [OSError(16, "busy"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_the_old_bundle_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out, work = bundle(tmp_path / "b"), bundle(tmp_path / ".b-work", policy="new")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path == work:
            assert not out.exists()
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        put_in_place(work, out)
    assert json.loads((out / "manifest.json").read_text()) == MANIFEST
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b-work", "b"]
