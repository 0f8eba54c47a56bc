from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime import (
    BundleError,
    BundleIntegrityError,
    BundleMissingError,
    BundleVersionError,
    Geometry,
    Manifest,
    OutOfMemoryError,
    PolicySettings,
    SettingsError,
    load,
    manifest as module,
)
from swiftvideo.runtime.manifest import SCHEMA, ScheduleInfo, Source, measure_files

SMALL = Geometry(2, 2, 12, 16, 8, 8, 16, 32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a valid manifest of two small files."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "tokenizer.json").write_bytes(b"words")
    (tmp_path / "onnx/denoise.onnx").write_bytes(bytes(range(256)) * 40)
    Manifest(
        model="small",
        dtype="fp32",
        geometry=SMALL,
        policy=PolicySettings(positions="absolute"),
        schedule=ScheduleInfo((1000.0, 937.5, 833.3333, 625.0), (1.0, 0.9, 0.8, 0.6)),
        source=Source("random", "0" * 64),
        text_encoder="none",
        files=measure_files(tmp_path),
    ).save(tmp_path)
    return tmp_path


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return folder


def test_a_manifest_comes_back_as_it_was_saved(saved: Path) -> None:
    manifest = Manifest.load(saved)
    assert manifest.geometry == SMALL and manifest.policy == PolicySettings(positions="absolute")
    assert manifest.folder == saved and manifest.schema == SCHEMA
    copy = manifest.save(saved / "copy")
    assert copy == manifest and copy.folder == saved / "copy"
    assert (saved / "copy/manifest.json").read_bytes() == (saved / "manifest.json").read_bytes()
    assert sorted(manifest.files) == ["onnx/denoise.onnx", "tokenizer.json"]
    assert bytes(manifest.read_file("onnx/denoise.onnx")) == bytes(range(256)) * 40
    assert manifest.read_file("tokenizer.json").readonly
    manifest.verify_all()


def test_a_fingerprint_tells_bundles_apart_by_their_files_only(saved: Path) -> None:
    manifest = Manifest.load(saved)
    assert dataclasses.replace(manifest, model="other").fingerprint == manifest.fingerprint
    (saved / "tokenizer.json").write_bytes(b"wordz")
    assert dataclasses.replace(manifest, files=measure_files(saved)).fingerprint != manifest.fingerprint


def test_what_was_compiled_is_no_part_of_a_fingerprint(saved: Path) -> None:
    """A session that was saved on one engine goes on with another."""
    manifest = Manifest.load(saved)

    def with_file(name: str) -> str:
        files = {**manifest.files, name: manifest.files["tokenizer.json"]}
        return dataclasses.replace(manifest, files=files).fingerprint

    assert with_file("trt/a.plan") == with_file("kernels/a.cubin") == manifest.fingerprint
    assert with_file("onnx/a.onnx") != manifest.fingerprint


def test_sizes_are_checked_without_reading(saved: Path) -> None:
    manifest = Manifest.load(saved)
    (saved / "tokenizer.json").write_bytes(b"wordz")
    manifest.check_sizes()
    (saved / "tokenizer.json").write_bytes(b"word")
    with pytest.raises(BundleIntegrityError, match=r"tokenizer\.json does not have the 5 bytes"):
        manifest.check_sizes()
    (saved / "tokenizer.json").unlink()
    with pytest.raises(BundleMissingError, match=r"tokenizer\.json is listed in the manifest and not there"):
        manifest.check_sizes()


@pytest.mark.parametrize("content", [b"word", b"words and more"])
def test_a_file_that_changes_its_size_meanwhile_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    manifest = Manifest.load(saved)
    monkeypatch.setattr(module, "_open", lambda path: io.BytesIO(content))
    with pytest.raises(BundleIntegrityError, match="does not have the 5 bytes"):
        manifest.read_file("tokenizer.json")


def test_a_file_may_come_in_pieces(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(buffer[:2])

    manifest = Manifest.load(saved)
    monkeypatch.setattr(module, "_open", lambda path: Slow(b"words"))
    assert bytes(manifest.read_file("tokenizer.json")) == b"words"


@pytest.mark.parametrize("where", ["nothing", "manifest.json"])
def test_a_missing_bundle_is_named(saved: Path, where: str) -> None:
    (saved / "manifest.json").unlink() if where == "nothing" else None
    target = saved if where == "nothing" else saved / where
    with pytest.raises(BundleMissingError, match=r"no bundle at '.*swiftvideo export") as caught:
        Manifest.load(target)
    assert str(target) in str(caught.value)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(
        BundleMissingError, match=r"manifest\.json cannot be read: .*; change its permissions"
    ):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda d: d.update(schema=2), BundleVersionError, r"schema 2 and this version .* reads 1: export"),
        (lambda d: d.update(schema=0), BundleVersionError, r"schema 0"),
        (lambda d: d.update(schema=True), BundleVersionError, r"schema True"),
        (lambda d: d.pop("schema"), BundleVersionError, r"schema None"),
        (lambda d: d.update(sound=1), BundleVersionError, r"unknown keys 'sound'; .*newer version"),
        (lambda d: d["policy"].update(mood=1), BundleVersionError, r"policy: unknown keys 'mood'"),
        (lambda d: d.pop("geometry"), BundleIntegrityError, r"keys 'geometry' are missing; export it again"),
        (lambda d: d.update(model=3), BundleIntegrityError, r"model is 3, which is no str"),
        (lambda d: d.update(dtype="int8"), BundleIntegrityError, r"dtype is 'int8'"),
        (
            lambda d: d.update(geometry=[1]),
            BundleIntegrityError,
            r"geometry: \[1\] where an object is needed",
        ),
        (lambda d: d["geometry"].update(layers="2"), BundleIntegrityError, r"geometry: layers is '2'"),
        (
            lambda d: d["geometry"].update(layers=0),
            BundleIntegrityError,
            r"layers is 0: it must be at least 1",
        ),
        (lambda d: d["geometry"].update(heads=-2), BundleIntegrityError, r"heads is -2"),
        *(
            (
                lambda d, name=name, value=value: d["geometry"].update({name: value}),
                BundleIntegrityError,
                rf"{name} is .*: it must be at most 65536",
            )
            for name, value in (
                *((name, 10**400) for name in ("layers", "text_len", "latent_channels", "temporal_stride")),
                ("text_len", 10**9),
                ("spatial_stride", 1 << 17),
                ("patch", [1, 2, 10**400]),
            )
        ),
        (
            lambda d: d["files"]["tokenizer.json"].update(size=10**400),
            BundleIntegrityError,
            r"nor beyond any disk",
        ),
        (
            lambda d: d["files"].update({"a\x1b[2Jb": d["files"]["tokenizer.json"]}),
            BundleIntegrityError,
            r"'a\\x1b\[2Jb': a plain relative path",
        ),
        (lambda d: d["geometry"].update(head_dim=7), BundleIntegrityError, r"head_dim is 7"),
        (lambda d: d["geometry"].update(patch=[1, 2]), BundleIntegrityError, r"patch is \[1, 2\]"),
        (lambda d: d["geometry"].update(patch=[1, 0, 2]), BundleIntegrityError, r"patch is \(1, 0, 2\)"),
        (
            lambda d: d["geometry"].update(latent_width=7),
            BundleIntegrityError,
            r"latent_width is 7.*patch, 2",
        ),
        (
            lambda d: d["geometry"].update(sink=4),
            BundleIntegrityError,
            r"sink is 4 and chunk is 3: a sink larger",
        ),
        (lambda d: d["geometry"].update(window=2), BundleIntegrityError, r"window 2, sink 3"),
        (lambda d: d["geometry"].update(steps=3), BundleIntegrityError, r"4 steps and geometry.steps is 3"),
        (
            lambda d: d["schedule"]["sigmas"].pop(),
            BundleIntegrityError,
            r"4 timesteps and 3 sigmas: as many of each, and at least one",
        ),
        (
            lambda d: d["schedule"].update(timesteps=[], sigmas=[]),
            BundleIntegrityError,
            r"0 timesteps and 0 sigmas",
        ),
        (lambda d: d["policy"].update(policy="guess"), BundleIntegrityError, r"policy is 'guess'"),
        (lambda d: d["files"]["tokenizer.json"].update(sha256="0"), BundleIntegrityError, r"sha256 is '0'"),
        (lambda d: d["files"]["tokenizer.json"].update(size=-1), BundleIntegrityError, r"size is -1"),
        (
            lambda d: d["files"].update({"../x": d["files"]["tokenizer.json"]}),
            BundleIntegrityError,
            r"'../x'",
        ),
        (
            lambda d: d["files"].update({"/etc/x": d["files"]["tokenizer.json"]}),
            BundleIntegrityError,
            r"/etc/x",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any], kind: type[BundleError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        Manifest.load(changed(saved, change))
    assert str(saved / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_json_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleIntegrityError, match=r"is not JSON .*export the bundle again"):
        Manifest.load(saved)


def test_a_manifest_that_is_too_large_is_not_read(saved: Path) -> None:
    with (saved / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)  # as a link to a device might have no end
    with pytest.raises(BundleIntegrityError, match=r"has 1099511627776 bytes and a manifest at most 4194304"):
        Manifest.load(saved)


def test_a_manifest_that_is_no_file_is_refused(saved: Path) -> None:
    path = saved / "manifest.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(BundleMissingError, match=r"manifest\.json is a pipe or a device; copy the whole"):
        Manifest.load(saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleMissingError, match=r"manifest\.json is a pipe or a device"):
        Manifest.load(saved)


def test_values_of_any_depth_and_length_are_told_shortly(saved: Path) -> None:
    path, text = saved / "manifest.json", (saved / "manifest.json").read_text()
    for value in ("[" * 900 + "]" * 900, json.dumps(["x" * 1000] * 1000)):
        path.write_text(text.replace('"small"', value))
        with pytest.raises(BundleIntegrityError, match=r"model is .*no str|nested too deeply") as caught:
            Manifest.load(saved)
        assert len(str(caught.value)) < 1000


def test_saving_follows_no_link_that_was_in_a_bundle(
    saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    precious = tmp_path_factory.mktemp("home") / "precious"
    precious.write_text("of the user")
    (saved / "manifest.json.partial").symlink_to(precious)
    Manifest.load(saved).save(saved)
    assert precious.read_text() == "of the user"
    assert not (saved / "manifest.json").is_symlink() and Manifest.load(saved).model == "small"


def test_a_manifest_must_be_an_object(saved: Path) -> None:
    (saved / "manifest.json").write_text("[1]")
    with pytest.raises(BundleIntegrityError, match="holds list, not an object"):
        Manifest.load(saved)


@pytest.mark.parametrize("index", [0, 5119, 10239])
def test_a_flipped_byte_is_found(saved: Path, index: int) -> None:
    path = saved / "onnx/denoise.onnx"
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)
    manifest = Manifest.load(saved)
    for check in (lambda: manifest.read_file("onnx/denoise.onnx"), manifest.verify_all):
        with pytest.raises(
            BundleIntegrityError, match=r"denoise.onnx was changed: its SHA-256 is not .*copy"
        ):
            check()


@pytest.mark.parametrize("size", [0, 10239, 10241])
def test_another_size_is_found(saved: Path, size: int) -> None:
    path = saved / "onnx/denoise.onnx"
    path.write_bytes((path.read_bytes() + b"x")[:size])
    with pytest.raises(BundleIntegrityError, match=r"does not have the 10240 bytes"):
        Manifest.load(saved).read_file("onnx/denoise.onnx")


def test_a_file_that_is_gone_or_not_listed_is_named(saved: Path) -> None:
    manifest = Manifest.load(saved)
    with pytest.raises(BundleMissingError, match=r"lists no 'onnx/x.onnx': it has onnx/denoise.onnx, tok"):
        manifest.read_file("onnx/x.onnx")
    (saved / "onnx/denoise.onnx").unlink()
    with pytest.raises(BundleMissingError, match=r"denoise.onnx is listed .* not there: copy"):
        manifest.read_file("onnx/denoise.onnx")
    (saved / "onnx/denoise.onnx").mkdir()
    with pytest.raises(BundleMissingError, match=r"not there"):
        manifest.verify_all()


def test_an_unsaved_manifest_has_no_files_to_read(saved: Path) -> None:
    with pytest.raises(BundleMissingError, match="belongs to no folder yet"):
        dataclasses.replace(Manifest.load(saved), folder=None).read_file("tokenizer.json")


def test_a_file_beyond_the_memory_is_our_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> bytearray:
        raise MemoryError

    monkeypatch.setattr(module, "bytearray", full, raising=False)
    with pytest.raises(OutOfMemoryError, match="needs 5 bytes of memory"):
        Manifest.load(saved).read_file("tokenizer.json")


def test_a_sink_beyond_a_chunk_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"sink is 4 and chunk is 3.*lower the sink or raise the chunk"):
        dataclasses.replace(SMALL, sink=4)


def test_a_window_without_room_for_a_chunk_beside_the_sink_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"window 5, sink 3, chunk 3.*window >= sink \+ chunk"):
        dataclasses.replace(SMALL, window=5)
    assert dataclasses.replace(SMALL, window=6).rows == SMALL.rows - 6 * SMALL.frame_tokens


def test_load_refuses_a_bundle_with_any_byte_flipped(tiny_bundle: Path, tmp_path: Path) -> None:
    names = sorted(Manifest.load(tiny_bundle).files)
    assert "tokenizer.json" in names and "onnx/denoise.onnx" in names
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        for other in ["manifest.json", *names]:
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            if other != name:
                (folder / other).symlink_to((tiny_bundle / other).resolve())
        shutil.copyfile(tiny_bundle / name, folder / name)
        data = bytearray((folder / name).read_bytes())
        if not data:  # of a graph without weights
            continue
        data[len(data) // 2] ^= 0x10
        (folder / name).write_bytes(data)
        with pytest.raises(BundleIntegrityError, match=rf"{name} was changed"):
            load(folder, threads=1)
        (folder / name).unlink()
        with pytest.raises(BundleMissingError, match=rf"{name} is listed in the manifest and not there"):
            load(folder, threads=1)
