from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swiftvideo.runtime.errors import UsageError
from swiftvideo.runtime.files import PARTIAL, is_there, replace, target


def test_a_file_is_its_owners_alone_whatever_was_there_and_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    path.chmod(0o666)
    umask = os.umask(0)
    try:
        replace(path, [b"a", memoryview(b"fter")])
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"after" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_or_is_interrupted_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def parts() -> Iterator[bytes]:
        yield b"after"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(path, parts())
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        replace(tmp_path / "folder", [b"x"])
    assert path.read_bytes() == b"before" and {item.name for item in tmp_path.iterdir()} == {"x", "folder"}


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path, meeting = tmp_path / "x", threading.Barrier(4)

    def parts(letter: bytes) -> Iterator[bytes]:
        yield letter * 1000
        meeting.wait(60)  # all four are in the middle of it
        yield letter * 1000

    letters = (b"a", b"b", b"c", b"d")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda letter: replace(path, parts(letter)), letters))
    assert path.read_bytes() in [letter * 2000 for letter in letters]
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_a_file_whose_name_says_so(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from swiftvideo.runtime import files\n"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "files.replace(pathlib.Path(sys.argv[1]), [b'half'])"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], timeout=120, check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert re.fullmatch("x" + PARTIAL, left.name) and left.read_bytes() == b"half"


def test_links_are_followed_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    link, real = tmp_path / "link", tmp_path / "real"
    link.symlink_to(real)
    assert target(link) == target(str(real)) == real
    os.mkfifo(real)
    with pytest.raises(UsageError, match=r"link' is a pipe or a device: give a file's name"):
        target(link)
    with pytest.raises(UsageError, match=r"is a pipe or a device"):
        target("/dev/null")
    with pytest.raises(UsageError, match=r"is a folder: give a file's name"):
        target(tmp_path)


def test_names_that_the_system_refuses_are_not_free(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for name, reason in (("a" * 300, "name too long"), ("circle", "levels of symbolic links")):
        with pytest.raises(OSError, match=reason):
            target(tmp_path / name)
    (tmp_path / "file").touch()
    assert target(tmp_path / "file" / "x") == tmp_path / "file" / "x"
    assert is_there(tmp_path / "circle") and not is_there(tmp_path / "file" / "x")
    with pytest.raises(OSError, match="name too long"):
        is_there(tmp_path / ("a" * 300))
