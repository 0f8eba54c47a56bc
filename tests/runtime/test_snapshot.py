from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from swiftvideo.runtime import (
    IntegrityError,
    Manifest,
    OutOfMemoryError,
    Pipeline,
    PolicySettings,
    Session,
    UsageError,
    load,
    tensorfile,
)
from swiftvideo.runtime.engines import host
from swiftvideo.runtime.snapshot import FORMAT
from tests.runtime.watch import turned

SETTINGS = PolicySettings(bridge=dataclasses.replace(PolicySettings().bridge, tau_low=0.0, tau_high=2.0))


def advance(session: Session, chunks: int) -> list[Any]:
    return [next(session) for _ in range(chunks)]


@pytest.fixture(scope="module")
def saved(pipeline: Pipeline, texts: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session after five chunks and a switch, with two prompts waiting."""
    path = tmp_path_factory.mktemp("saved") / "session.safetensors"
    with pipeline.session(texts[0], 7, SETTINGS) as session:
        advance(session, 3)
        session.prompt(texts[1])
        advance(session, 2)
        session.prompt(texts[2])
        session.prompt(texts[0], at_frame=24)
        session.save(path)
    return path


def test_a_restored_session_continues_byte_for_byte(
    pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path
) -> None:
    with pipeline.session(texts[0], 7, SETTINGS) as session:
        session.save(tmp_path / "start")
        first = advance(session, 3)
        session.prompt(texts[1])
        first += advance(session, 2)
        session.prompt(texts[2])
        session.prompt(texts[0], at_frame=24)
        session.save(tmp_path / "middle")
        rest = advance(session, 5)
        session.save(tmp_path / "end")
        last = next(session)
    assert {path.name for path in tmp_path.iterdir()} == {"start", "middle", "end"}
    with pipeline.restore(tmp_path / "start") as again:
        for a, b in zip(first[:2], advance(again, 2), strict=True):
            np.testing.assert_array_equal(a.frames, b.frames)
    with pipeline.restore(tmp_path / "middle") as again:
        assert (again.seed, again.settings, again.frame) == (7, SETTINGS, 15)
        with pytest.raises(UsageError, match="the next chunk starts at latent frame 15"):
            again.prompt(texts[1], at_frame=14)
        for a, b in zip(rest, advance(again, 5), strict=True):
            assert (a.index, a.first_frame, a.prompt, a.prompt_id) == (
                b.index,
                b.first_frame,
                b.prompt,
                b.prompt_id,
            )
            assert (a.window, a.mode, a.rho) == (b.window, b.mode, b.rho)
            np.testing.assert_array_equal(a.latents, b.latents)
            np.testing.assert_array_equal(a.frames, b.frames)
        assert again.prompt(texts[1]) == 4
        again.save(tmp_path / "end2")
    with pipeline.restore(tmp_path / "end") as one, pipeline.restore(tmp_path / "end2") as two:
        two._rollout.pending.clear()
        for again in (one, two):
            chunk = next(again)
            assert (chunk.window, chunk.prompt_id) == (last.window, last.prompt_id)
            np.testing.assert_array_equal(chunk.frames, last.frames)


def test_saving_changes_nothing(pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path) -> None:
    with pipeline.session(texts[0], 7) as one, pipeline.session(texts[0], 7) as two:
        for _ in range(2):
            one.save(tmp_path / "x")
            np.testing.assert_array_equal(next(one).frames, next(two).frames)


def test_a_snapshot_is_of_its_moment_however_late_and_by_whom_it_is_written(
    pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path
) -> None:
    with pipeline.session(texts[0], 7, SETTINGS) as session:
        advance(session, 3)
        session.prompt(texts[1])
        advance(session, 2)
        session.prompt(texts[2])
        session.save(tmp_path / "then")
        state = session.snapshot()
        held = {name: value.copy() for name, value in state.arrays.items()}
        go_on, errors = threading.Event(), []

        def write() -> None:
            try:
                assert go_on.wait(60)
                state.save(tmp_path / "later")
            except BaseException as error:  # noqa: BLE001 - shown below
                errors.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        advance(session, 7)
    go_on.set()
    writer.join(60)
    assert not errors and "engine/sink_k" in held and "memory/bridge" in held
    for name, value in held.items():
        np.testing.assert_array_equal(state.arrays[name], value, err_msg=name)
    assert (tmp_path / "later").read_bytes() == (tmp_path / "then").read_bytes()
    assert (state.index, state.asked) == (5, 3)
    assert 0 < (tmp_path / "then").stat().st_size - state.nbytes < 10_000


def test_chunks_are_made_while_a_session_is_saved(
    pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    replace = tensorfile.replace

    def slow(*arguments: Any) -> None:
        reached.set()
        assert go_on.wait(60)
        replace(*arguments)

    monkeypatch.setattr(tensorfile, "replace", slow)
    with pipeline.session(texts[0]) as session:
        advance(session, 1)
        writer = threading.Thread(target=session.save, args=(tmp_path / "x",))
        writer.start()
        assert reached.wait(60)
        second = next(session)
    go_on.set()
    writer.join(60)
    with pipeline.restore(tmp_path / "x") as again:
        np.testing.assert_array_equal(next(again).frames, second.frames)


def test_a_copy_that_does_not_fit_costs_nothing_else(
    pipeline: Pipeline, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipeline.session(texts[0]) as session:
        with monkeypatch.context() as patch:
            patch.setattr(host, "available_memory", lambda: 1000)
            with pytest.raises(
                OutOfMemoryError, match=r"a copy of a session needs \d+ MiB and 0 MiB are free"
            ):
                session.snapshot()
        assert next(session).index == 0 and session.snapshot().index == 1


def test_the_model_must_be_the_same(saved: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    for name in manifest.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to((tiny_bundle / name).resolve())
    (tmp_path / "extra").write_bytes(b"!")
    files = {**manifest.files, "extra": dataclasses.replace(manifest.files["tokenizer.json"])}
    dataclasses.replace(manifest, files=files).save(tmp_path)
    with load(tmp_path, threads=1) as other:
        with pytest.raises(UsageError, match=r"was saved with another model.*load the bundle that it"):
            other.restore(saved)


def test_a_file_that_is_no_session_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(UsageError, match=r"x is not there: save it first"):
        pipeline.restore(path)
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(UsageError, match=r"x is not what was saved"):
        pipeline.restore(path)
    for other in ("pt", "swiftvideo-session-1"):
        save_file({"a": np.zeros(1)}, path, {"format": other})
        with pytest.raises(
            UsageError, match=f"has format '{other}', not 'swiftvideo-session-2': it is something"
        ):
            pipeline.restore(path)
    with pytest.raises(UsageError, match=r"is not what was saved"):
        pipeline.restore(tmp_path)


def test_a_truncated_file_is_refused(pipeline: Pipeline, saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 4, 500, len(data) // 2, len(data) - 1):
        (tmp_path / "x").write_bytes(data[:size])
        with pytest.raises(UsageError, match=r"x is not what was saved .*save it again"):
            pipeline.restore(tmp_path / "x")


@pytest.mark.parametrize("name", ["cache_k", "cache_v", "sink_k", "vae_cache_0"])
def test_an_array_that_was_changed_is_refused(
    pipeline: Pipeline, saved: Path, tmp_path: Path, name: str
) -> None:
    value = tensorfile.read(saved, FORMAT)[1][f"engine/{name}"]
    data = saved.read_bytes()
    at = data.index(value.tobytes())
    for changed in (bytes([data[at] ^ 1]), np.full_like(value, np.nan).tobytes()):
        (tmp_path / "x").write_bytes(data[:at] + changed + data[at + len(changed) :])
        with pytest.raises(
            UsageError, match=r"x is not what was saved .its SHA-256 is another.: save it again"
        ):
            pipeline.restore(tmp_path / "x")


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda plain, arrays: arrays.pop(name)


def told(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda plain, arrays: plain.update(values)


@pytest.mark.parametrize(
    "change",
    [
        *(drop(name) for name in ("emitted", "engine/cache_k", "memory/bridge", "memory/anchor.0")),
        told(index=2),
        told(index=6),
        told(index=-1),
        told(index=5.0),
        told(asked=7.5),
        told(index="many"),
        told(seed=-1),
        told(prompt="zebra"),
        told(prompt=3),
        told(pending=[[1]]),
        told(memory={}),
        told(settings={"policy": "x"}),
        told(surplus=1),
        lambda plain, arrays: plain["memory"]["cache"].__setitem__(5, 10**9),
        *(
            lambda plain, arrays, places=places: plain["memory"].update(places=places)
            for places in (
                *([0], [], None, [0, 0, 0, -1], [0, 0, 0, 0.5], [0, 0, 0, 0, 0], "0000"),
                *([n if i == at else 0 for i in range(4)] for at in range(4) for n in (10**9, 10**400)),
            )
        ),
        *(
            lambda plain, arrays, scale=scale: plain["memory"].update(bridge_scale=scale)
            for scale in (float("nan"), -1.0, 1e308, 10**400, None)
        ),
        *(
            told(**{name: value})
            for name in ("index", "number", "asked", "segment")
            for value in (float("inf"), -1, 10**30, 0.5)
        ),
        told(number=7, asked=7),
        told(pending=[[30.5, 3, "a red circle"]]),
        told(pending=[[float("inf"), 3, "a red circle"]]),
        *(
            told(asked=4, pending=[[frame, number, "a red circle moving right at night"]])
            for frame, number in ((10**400, 3), (-(10**400), 3), (30, -3), (30, 0), (30, 4))
        ),
        lambda plain, arrays: arrays.update({"memory/anchor.0": arrays["memory/anchor.0"][:1]}),
        lambda plain, arrays: arrays.update({"memory/bridge": np.repeat(arrays["memory/bridge"], 2, 1)}),
        lambda plain, arrays: arrays.update({"memory/bridge": arrays["memory/bridge"] * np.float32("nan")}),
        lambda plain, arrays: arrays.update({"memory/bridge": arrays["memory/bridge"].astype(np.float64)}),
        lambda plain, arrays: plain.pop("asked"),
        lambda plain, arrays: arrays.update({"engine/cache_v": arrays["engine/cache_v"][:1]}),
        lambda plain, arrays: arrays.update({"engine/cache_k": arrays["engine/cache_k"].astype(np.float64)}),
        lambda plain, arrays: arrays.update({"memory/bridge": arrays["memory/bridge"][..., :1]}),
        lambda plain, arrays: arrays.update(emitted=arrays["emitted"][:, :2]),
        lambda plain, arrays: arrays.update(emitted=arrays["emitted"].astype(np.float64)),
        lambda plain, arrays: arrays.pop(next(name for name in arrays if "vae" in name)),
        lambda plain, arrays: arrays.update(
            {name: array[..., :1] for name, array in arrays.items() if "vae" in name}
        ),
        lambda plain, arrays: arrays.update(
            {name: array.astype(np.float64) for name, array in arrays.items() if "vae" in name}
        ),
        lambda plain, arrays: arrays.update({"engine/sink_k": arrays["engine/sink_k"][:, :, :1]}),
        lambda plain, arrays: arrays.update({"engine/surplus": arrays["engine/cache_k"]}),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(
    pipeline: Pipeline, saved: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> None:
    """Also where its checksum is right, as of a file that somebody made."""
    text, arrays = tensorfile.read(saved, FORMAT)
    plain = json.loads(text)
    change(plain, arrays)
    path = tmp_path / "x"
    tensorfile.write(path, FORMAT, json.dumps(plain), arrays)
    with pytest.raises((UsageError, IntegrityError)):
        pipeline.restore(path)


def test_a_session_that_cannot_be_restored_is_closed(
    pipeline: Pipeline, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, arrays = tensorfile.read(saved, FORMAT)
    del arrays["engine/cache_k"]
    tensorfile.write(tmp_path / "x", FORMAT, text, arrays)
    closed: list[Session] = []

    def close(session: Session) -> None:
        closed.append(session)

    monkeypatch.setattr(Session, "close", close)
    with pytest.raises(UsageError, match="cache_k of the saved state is missing"):
        pipeline.restore(tmp_path / "x")
    assert len(closed) == 1


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_file_whose_text_says_nothing_is_refused(pipeline: Pipeline, tmp_path: Path, text: str) -> None:
    tensorfile.write(tmp_path / "x", FORMAT, text, {})
    with pytest.raises(UsageError, match=r"x is no saved session .*save it again"):
        pipeline.restore(tmp_path / "x")


def test_an_interrupt_while_saving_leaves_no_file(
    pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pipeline.session(texts[0]) as session:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", interrupt)
            session.save(tmp_path / "x")
        assert not list(tmp_path.iterdir())
        assert next(session).index == 0


def test_what_cannot_be_written_leaves_no_file(
    pipeline: Pipeline, texts: tuple[str, ...], tmp_path: Path
) -> None:
    with pipeline.session(texts[0]) as session:
        with pytest.raises(UsageError, match=r"cannot be written .*choose another place"):
            session.save(tmp_path / "no" / "x")
        for impossible in (tmp_path / ("x" * 300), f"{tmp_path}/a\0b"):
            with pytest.raises(UsageError, match=r"cannot be written"):
                session.save(impossible)
        with pytest.raises(UsageError, match=r"^'\S+' is a folder: give a file's name$"):
            session.save(tmp_path)
        wrong: Any = None
        with pytest.raises(UsageError, match="path is None: the name of a file is needed"):
            session.save(wrong)
        prompt = dataclasses.replace(
            turned(pipeline.encode(texts[0]), pipeline.encode(texts[1]), 0.5), text=""
        )
        session.prompt(prompt)
        with pytest.raises(UsageError, match=r"made from embeddings: only prompts with a text can be saved"):
            session.save(tmp_path / "x")
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


def test_a_file_that_is_larger_than_the_memory_is_not_read(pipeline: Pipeline, tmp_path: Path) -> None:
    """Such as one that is nearly all holes, which costs whoever sends it nothing."""
    size = 1 << 42
    header = json.dumps(
        {
            "__metadata__": {"format": FORMAT, "text": "{}", "sha256": ""},
            "x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        }
    ).encode()
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(OutOfMemoryError, match=r"x has 4194304 MiB and .* are free"):
        pipeline.restore(path)


def test_a_pipe_is_no_saved_session(pipeline: Pipeline, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UsageError, match=r"x is not what was saved .it is no file"):
        pipeline.restore(tmp_path / "x")


def test_a_prompt_for_a_frame_that_never_comes_is_refused(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    with pipeline.session(texts[0]) as session:
        with pytest.raises(UsageError, match=r"at_frame is 4611686018427387904"):
            session.prompt(texts[1], at_frame=1 << 62)
        session.prompt(texts[1], at_frame=(1 << 62) - 1)
        next(session)
