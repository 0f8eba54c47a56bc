"""Writing a bundle is all or nothing, and its manifest says what is in it."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.export import bundle
from swiftvideo.export.bundle import GRAPH_COUNT, export_bundle
from swiftvideo.export.destination import BundleWriteError
from swiftvideo.export.graphs import Graph
from swiftvideo.export.weights import WeightFile
from swiftvideo.runtime import load
from swiftvideo.runtime.errors import CheckpointError, SettingsError
from swiftvideo.runtime.manifest import GRAPHS, FileEntry, Manifest

from . import small


class Stub:
    """Stands for export_graph where the graphs' content does not matter."""

    def __init__(self, fail_at: str = "", error: BaseException | None = None) -> None:
        self.fail_at, self.error, self.devices = fail_at, error, dict[str, str]()

    def __call__(self, graph: Graph, folder: Path, file: WeightFile) -> None:
        if graph.name == self.fail_at and self.error is not None:
            raise self.error
        parameters = [parameter.device.type for parameter in graph.module.parameters()]
        self.devices[graph.name] = "".join(sorted(set(parameters)))
        (folder / f"{graph.name}.onnx").write_bytes(graph.name.encode())


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(bundle, "export_graph", made)
    return made


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_in_it(small_bundle: Path) -> None:
    manifest, checkpoint = Manifest.load(small_bundle), small.checkpoint()
    listed = set(manifest.files)
    assert listed == names(small_bundle) - {"manifest.json"}
    assert {f"onnx/{name}.onnx" for name in GRAPHS} <= listed
    for name, entry in manifest.files.items():
        content = (small_bundle / name).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert entry.size > 0, name
    assert (manifest.model, manifest.dtype) == ("small", "fp32")
    assert manifest.geometry == checkpoint.geometry()
    assert (manifest.geometry.height, manifest.geometry.width) == (small.HEIGHT, small.WIDTH)
    assert manifest.policy == checkpoint.info.policy
    assert manifest.schedule.timesteps == tuple(checkpoint.schedule.steps.tolist())
    assert manifest.source.sha256 == checkpoint.sha256
    assert re.fullmatch(r"small; swiftvideo [\d.]+\S*, torch [\d.]+\S*", manifest.source.kind)
    assert manifest.text_encoder == "1 layers of width 16, 50 tokens"
    assert (small_bundle / "tokenizer.json").read_bytes() == checkpoint.tokenizer


def test_both_decoders_share_their_weights(small_bundle: Path) -> None:
    data = {path.name: path.stat().st_size for path in (small_bundle / "onnx").glob("*.data")}
    assert sorted(data) == ["condition.data", "decoder.data", "denoise.data", "text_encoder.data"]
    weights = sum(parameter.numel() for parameter in small.checkpoint().vae.parameters()) * 4
    assert data["decoder.data"] < 1.5 * weights  # a second copy would be twice; the rest is alignment


def test_it_makes_video(small_bundle: Path) -> None:
    with load(small_bundle, threads=1) as pipeline, pipeline.session("w1 w2", seed=3) as session:
        first, second = next(session), next(session)
    assert first.frames.shape == (
        5,
        small.HEIGHT,
        small.WIDTH,
        3,
    )  # one frame, then two for each latent frame
    assert second.frames.shape == (6, small.HEIGHT, small.WIDTH, 3)


def test_progress(stub: Stub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export_bundle(small.checkpoint(), tmp_path / "b", progress=lambda *step: seen.append(step))
    assert [name for name, _, _ in seen] == [
        *("text_encoder", "condition", "denoise", "inject", "decode_first", "decode", "done")
    ]
    assert [done for _, done, _ in seen] == list(range(7))
    assert {total for _, _, total in seen} == {GRAPH_COUNT}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(bundle, "export_graph", Stub("inject", error))
    with pytest.raises(type(error)):
        export_bundle(small.checkpoint(), tmp_path / "new" / "deep" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_bundle_that_was_there(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(small.checkpoint(), tmp_path / "b")
    before = {name: (tmp_path / "b" / name).read_bytes() for name in names(tmp_path / "b")}
    monkeypatch.setattr(bundle, "export_graph", Stub("decode", RuntimeError("no")))
    with pytest.raises(RuntimeError):
        export_bundle(small.checkpoint(), tmp_path / "b", overwrite=True)
    assert {name: (tmp_path / "b" / name).read_bytes() for name in names(tmp_path / "b")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_overwriting(stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    export_bundle(small.checkpoint(), out)  # an empty folder is as good as none
    with pytest.raises(SettingsError, match="--overwrite"):
        export_bundle(small.checkpoint(), out)
    manifest = export_bundle(small.checkpoint(), out, overwrite=True, height=16, width=8)
    assert (manifest.geometry.height, manifest.geometry.width) == (16, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_cannot_be_overwritten_is_said_before_any_graph(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingsError, match="holds no bundle"):
        export_bundle(small.checkpoint(), tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert stub.devices == {}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_what_somebody_adds_meanwhile_stays_and_so_does_the_bundle(
    stub: Stub, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "deep" / "b"
    if overwrite:
        export_bundle(small.checkpoint(), out)
    before = names(out)

    def meanwhile(graph: str, done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(BundleWriteError, match="changed during the export") as caught:
        export_bundle(small.checkpoint(), out, progress=meanwhile, overwrite=overwrite)
    assert names(out) == before | {"thesis.tex"}
    (kept,) = set(out.parent.iterdir()) - {out}
    assert f"the finished bundle is {kept}: move" in str(caught.value) and kept.name.startswith("b-")
    assert {f"onnx/{name}.onnx" for name in GRAPHS} <= set(Manifest.load(kept).files)


def test_the_second_of_two_exports_at_once_replaces_nothing(stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "b"

    def first(graph: str, done: int, total: int) -> None:
        if done == 5:
            export_bundle(small.checkpoint(), out)

    with pytest.raises(BundleWriteError, match="the finished bundle is"):
        export_bundle(small.checkpoint(), out, progress=first, height=16, width=8)
    assert Manifest.load(out).geometry.height == small.HEIGHT
    (kept,) = set(tmp_path.iterdir()) - {out}
    assert Manifest.load(kept).geometry.height == 16


def test_what_could_not_be_opened_replaces_nothing(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(small.checkpoint(), tmp_path / "b")
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    monkeypatch.setattr(bundle, "measure_files", lambda work: {"../b": FileEntry("0" * 64, 1)})
    with pytest.raises(SettingsError, match="plain relative path"):
        export_bundle(small.checkpoint(), tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_full_disk_is_said_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(bundle, "export_graph", Stub("denoise", full))
    with pytest.raises(
        BundleWriteError, match=rf"{tmp_path / 'b'} cannot be .*No space left.*free some space"
    ):
        export_bundle(small.checkpoint(), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{"dtype": "int8"}, {"height": 9}, {"width": 2, "height": 8}, {"policy": "swift"}]
)
def test_wrong_settings(stub: Stub, tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        export_bundle(small.checkpoint(), tmp_path / "b", **bad)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("backbone", "head.head.weight"),
        ("text_encoder", "encoder.shared.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_weights_that_do_not_fit_into_the_dtype_are_refused(
    stub: Stub, tmp_path: Path, part: str, where: str
) -> None:
    made = small.checkpoint()
    name = next(name for name in getattr(made, part).state_dict() if name.endswith(where))
    getattr(made, part).state_dict()[name].view(-1)[3] = 1e5
    export_bundle(made, tmp_path / "wide", dtype="bf16")
    with pytest.raises(CheckpointError, match=rf"of small: \S*{where} .* torch.float16; use bf16 or fp32"):
        export_bundle(made, tmp_path / "narrow", dtype="fp16")
    assert not (tmp_path / "narrow").exists()


def test_weights_are_not_checked_again_where_they_stay_as_they_are(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(bundle, "check_finite", lambda state, source: checked.extend(state))
    made = small.checkpoint()
    export_bundle(made, tmp_path / "fp32")
    assert checked == []
    export_bundle(made, tmp_path / "fp16", dtype="fp16")
    parts = (made.backbone, made.text_encoder, made.vae)
    half = [name for part in parts for name, value in part.state_dict().items() if value.itemsize == 2]
    assert checked == half and len(half) > 50


def test_consuming_gives_up_the_weights(stub: Stub, tmp_path: Path) -> None:
    checkpoint = small.checkpoint()
    export_bundle(checkpoint, tmp_path / "b", dtype="bf16", consume=True)
    assert {name: device for name, device in stub.devices.items() if name != "inject"} == dict.fromkeys(
        (name for name in GRAPHS if name != "inject"), "cpu"
    )
    parts = (checkpoint.backbone, checkpoint.text_encoder, checkpoint.vae)
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())
