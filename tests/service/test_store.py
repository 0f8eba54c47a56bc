"""The folder of snapshots: what is ours in it, how long it stays and how much it may take."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime.errors import SettingsError, SwiftVideoError, UsageError
from swiftvideo.sdk.server.session import Kept
from swiftvideo.sdk.server.store import Store, Stored

IDS = [f"{number:016x}" for number in range(4)]
OLD = 1000.0


def opened(folder: Path, space: int = 1 << 20) -> Store:
    return Store(folder, age=100, space=space)


def snapshot(store: Store, id: str, index: int = 1, size: int = 5, age: float = 0.0) -> Stored:
    """A whole one."""
    stored = Stored(id, f"hash {id}", "ann", index, 4, 1, 30.0, 0, 4, 1, [("a", 1, "w1", 3)])
    Path(store.session_path(id, index)).write_bytes(bytes(size))
    store.write(stored, [Kept(4, b"", b"four"), Kept(5, b"applied", b"five")])
    for path in store.folder.glob(f"{id}.*"):
        grow_old(path, age)
    return stored


def grow_old(path: Path, age: float = OLD) -> None:
    os.utime(path, (time.time() - age,) * 2)


def test_a_snapshot_is_whole_or_not_there(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    assert store.folder.stat().st_mode & 0o777 == 0o700
    older, partial = (Path(store.session_path(IDS[0], index)) for index in (3, 9))
    older.write_bytes(b"older")
    partial.write_bytes(b"never completed")
    assert store.find(f"hash {IDS[0]}") is None
    stored = snapshot(store, IDS[0], 6)
    assert store.find(stored.token_hash) == stored and store.find("other") is None
    assert store.chunks(stored) == [Kept(4, b"", b"four"), Kept(5, b"applied", b"five")]
    assert not older.exists() and not partial.exists()
    broken = store.folder / f"{IDS[1]}.json"
    broken.write_text("{")
    assert store.find(stored.token_hash) == stored
    grow_old(broken)
    store.expire(())
    assert not broken.exists() and store.find(stored.token_hash) == stored
    store.delete(IDS[0])
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("stage", ["chunks", "json"])
def test_a_snapshot_that_finds_the_disk_full_leaves_the_one_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    store = opened(tmp_path / "s")
    before = snapshot(store, IDS[0], 6)
    there, used = sorted(store.folder.iterdir()), store.used
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target.suffix == f".{stage}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises((OSError, UsageError), match="No space left on device"):
        snapshot(store, IDS[0], 9)
    assert (sorted(store.folder.iterdir()), store.used) == (there, used)
    assert store.find(before.token_hash) == before and store.chunks(before)


@pytest.mark.parametrize("stage", ["session", "chunks", "json"])
def test_what_a_killed_server_was_writing_counts_and_goes(tmp_path: Path, stage: str) -> None:
    """Also the file of a snapshot that is written again after the restart."""
    program = f"""if True:
        import os, sys
        from pathlib import Path
        from swiftvideo.runtime import files
        from swiftvideo.sdk.server.session import Kept
        from swiftvideo.sdk.server.store import Store, Stored
        replace = Path.replace
        def killed(self, target):
            if {f".{stage}."!r} in self.name:
                os.kill(os.getpid(), 9)
            return replace(self, target)
        Path.replace = killed
        store = Store(Path(sys.argv[1]), 100, 1 << 20)
        files.replace(Path(store.session_path({IDS[0]!r}, 1)), [b"session"])
        store.write(Stored({IDS[0]!r}, "hash", "ann", 1, 4, 1, 30.0, 0, 4, 1, []), [Kept(4, b"", b"four")])
    """
    for _ in range(2):
        killed = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "s")], timeout=120, check=False
        )
        assert killed.returncode == -9
    left = list((tmp_path / "s").iterdir())
    partial = [path for path in left if path.suffix == ".partial"]
    assert len(partial) == 2 and all(f".{stage}." in path.name for path in partial)
    store = opened(tmp_path / "s")
    store.expire({IDS[0]})
    assert store.used == sum(path.stat().st_size for path in left)
    stored = snapshot(store, IDS[0])
    assert len(list(store.folder.iterdir())) == 3 and store.find(stored.token_hash) == stored
    for path in partial:
        path.touch()
        grow_old(path)
    store.delete(IDS[0])
    assert list(store.folder.iterdir()) == []
    for path in partial:
        path.touch()
        grow_old(path)
    store.expire(())
    assert list(store.folder.iterdir()) == []


def test_a_snapshot_that_was_changed_is_not_used(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    stored = snapshot(store, IDS[0])
    path = store.folder / f"{IDS[0]}.1.chunks"
    data = path.read_bytes()
    at = data.index(b"five")
    path.write_bytes(data[:at] + b"fiwe" + data[at + 4 :])
    with pytest.raises(UsageError, match=r"chunks is not what was saved .its SHA-256 is another"):
        store.chunks(stored)
    path.write_bytes(data)
    document = store.folder / f"{IDS[0]}.json"
    document.write_text(document.read_text().replace('"w1"', '"w2"'))
    changed = store.find(stored.token_hash)
    assert changed is not None and changed.prompts[0][2] == "w2"
    with pytest.raises(UsageError, match=rf"chunks is not of the same snapshot as {IDS[0]}.json"):
        store.chunks(changed)
    path.unlink()
    with pytest.raises(UsageError, match="chunks is not there"):
        store.chunks(stored)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "[" * 100_000,
        *(
            json.dumps({**json.loads(Stored("", "x", "ann", 1, 4, 1, 30.0, 0, 4, 1, []).json()), name: value})
            for name, value in (
                *(("token_hash", value) for value in (3, None, "\u00e9", "\ud800")),
                *(("client", []), ("index", "1"), ("linger", "long"), ("prompts", [[1]]), ("surplus", 1)),
            )
        ),
    ],
)
def test_a_document_that_is_none_hides_no_other(tmp_path: Path, text: str) -> None:
    store = opened(tmp_path / "s")
    stored = snapshot(store, IDS[1])
    (store.folder / f"{IDS[0]}.json").write_text(text)
    assert store.find(stored.token_hash) == stored and store.find("other") is None


def test_a_pipe_in_the_folder_stops_nobody(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    stored = snapshot(store, IDS[1])
    os.mkfifo(store.folder / f"{IDS[0]}.json")
    found: list[Stored | None] = []
    thread = threading.Thread(target=lambda: found.append(store.find("other")), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [None] and store.find(stored.token_hash) == stored


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    names = (
        *("package.json", "my.session", "x.3.chunks", "a.partial", f"{IDS[0]}.txt", f"{IDS[0]}.x.session"),
        *(f"{IDS[0]}.json.partial", f"{IDS[0]}.1.chunks.0123456x.partial", "package.json.01234567.partial"),
    )
    for name in names:
        (tmp_path / "s" / name).write_text("precious")
        grow_old(tmp_path / "s" / name)
    store = opened(tmp_path / "s", space=1)
    snapshot(store, IDS[0], age=OLD)
    store.expire(())
    store.delete(IDS[0])
    store.expire(())
    assert {path.name for path in store.folder.iterdir()} == set(names)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o777])
def test_a_folder_that_is_open_to_others_is_refused_and_stays_as_it_is(tmp_path: Path, mode: int) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(mode)
    with pytest.raises(SettingsError, match=rf"open to others .mode {mode:04o}.*name a folder in it"):
        opened(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == mode
    opened(tmp_path / "s" / "own")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_that_can_be_no_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SwiftVideoError, match=r"snapshots .* cannot be made") as caught:
        opened(tmp_path / place)
    assert not isinstance(caught.value, UsageError), "it may be there a moment later"


def test_what_is_old_goes_but_not_while_its_session_lives(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    snapshots = [snapshot(store, id, age=OLD) for id in IDS[:2]]
    store.expire({IDS[0]})
    assert store.find(snapshots[0].token_hash) and store.find(snapshots[1].token_hash) is None
    store.expire(())  # it lived until now
    assert store.find(snapshots[0].token_hash)


def test_the_oldest_that_do_not_live_make_room(tmp_path: Path) -> None:
    store = opened(tmp_path / "s", space=40_000)
    snapshots = [snapshot(store, id, size=10_000, age=30 - at) for at, id in enumerate(IDS[:2])]
    living = snapshot(store, IDS[2], size=1000, age=50)
    assert not store.full and all(store.find(item.token_hash) for item in snapshots)
    newest = Stored(IDS[3], "hash", "ann", 1, 4, 1, 30.0, 0, 4, 1, [])
    Path(store.session_path(IDS[3], 1)).write_bytes(bytes(20_000))
    store.write(newest, [], {IDS[2], IDS[3]})
    assert [bool(store.find(item.token_hash)) for item in (*snapshots, living, newest)] == [
        False,
        True,
        True,
        True,
    ]
    assert not store.full
    Path(store.session_path(IDS[3], 2)).write_bytes(bytes(40_000))
    store.expire({IDS[2], IDS[3]})
    assert store.full and len(list(store.folder.glob("*.json"))) == 2
    store.delete(IDS[3])
    assert not store.full


def test_a_file_that_cannot_be_looked_at_or_deleted_spares_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path / "s")
    for id in IDS[:3]:
        snapshot(store, id, age=OLD)
    stat, unlink = Path.stat, Path.unlink

    def no_stat(path: Path, **options: Any) -> os.stat_result:
        if path.name.startswith(IDS[0]):
            raise PermissionError(13, "no")
        return stat(path, **options)

    def no_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(IDS[1]):
            raise OSError(30, "read-only")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "stat", no_stat)
    monkeypatch.setattr(Path, "unlink", no_unlink)
    store.expire(())
    assert {path.name.partition(".")[0] for path in store.folder.iterdir()} == set(IDS[:2])
