"""MP4 files, read back with FFmpeg's decoder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from swiftvideo.runtime.errors import ClosedError, SettingsError
from swiftvideo.sdk import video
from swiftvideo.sdk.output import OutputError
from swiftvideo.sdk.video import VideoWriter, choose_codec

ROOT = Path(__file__).parents[2]
COLOURS = np.array([(230, 30, 30), (30, 200, 60), (40, 60, 220), (250, 250, 250), (5, 5, 5)], np.uint8)


def colours(count: int, size: int = 64) -> NDArray[np.uint8]:
    """`count` plain frames, each of the next colour."""
    frames = np.empty((count, size, size, 3), np.uint8)
    frames[:] = COLOURS[np.arange(count) % len(COLOURS)][:, None, None]
    return frames


def moving(count: int, size: int = 64) -> NDArray[np.uint8]:
    """`count` frames of a disc that moves over a shaded ground."""
    y, x = np.mgrid[:size, :size]
    frames = np.empty((count, size, size, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = (np.stack([x, y, x + y], -1) + 8 * number) % 256 // 2
        frame[(x - 16 - 3 * number) ** 2 + (y - 32) ** 2 < 144] = COLOURS[0]
    return frames


def read(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("codec", [None, "mpeg4"])
def test_every_frame_comes_back_in_its_colour(tmp_path: Path, codec: str | None) -> None:
    frames = colours(31)
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 12, codec) as writer:
        writer.write(memoryview(frames[:1]))  # as a chunk from a server has them
        writer.write(frames[1:])
        assert writer.frames == 31
    decoded = read(tmp_path / "a.mp4")
    assert len(decoded) == 31
    assert np.abs(np.mean(decoded, (1, 2)) - np.mean(frames, (1, 2))).max() < 8


def test_it_is_an_ordinary_mp4_that_players_know(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 32, 12) as writer:
        writer.write(colours(24)[:, :32])
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (64, 32, 12, 24)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1 and stream.codec_context.color_range == 1
        assert stream.duration is not None and stream.time_base is not None
        assert float(stream.duration * stream.time_base) == pytest.approx(2.0)


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4", "the service's h264"])
def test_the_same_frames_give_the_same_file(tmp_path: Path, encoder: str) -> None:
    """Also where the encoder's memory held other bytes before: glibc fills it with those of `MALLOC_PERTURB_`."""
    out = tmp_path / "a.mp4"
    program = f"""
from swiftvideo.sdk.server.payload import pack, pb
from tests.sdk.test_video import *
if {encoder!r} in video.CODECS:
    with VideoWriter({str(out)!r}, 64, 64, 12, {encoder!r}) as writer:
        writer.write(moving(8))
else:
    Path({str(out)!r}).write_bytes(pack(moving(8), pb.ENCODING_H264, 12)[0])
"""
    files = set()
    for byte in ("0", "85", "170"):
        environment = {**os.environ, "MALLOC_PERTURB_": byte}
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, env=environment)
        files.add(out.read_bytes())
    assert len(files) == 1


def test_a_killed_writer_leaves_a_file_that_plays(tmp_path: Path) -> None:
    program = f"""
import os
from tests.sdk.test_video import *
writer = VideoWriter({str(tmp_path / "a.mp4")!r}, 64, 64, 12)
writer.write(colours(96))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 9
    decoded = read(tmp_path / "a.mp4")
    assert 48 <= len(decoded) <= 96
    assert np.abs(np.mean(decoded, (1, 2)) - np.mean(colours(len(decoded)), (1, 2))).max() < 8


def test_a_file_without_frames_is_not_left_behind(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 64, 64, 12)
    writer.close()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_there_stays_where_nothing_was_made(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    VideoWriter(path, 64, 64, 12).close()
    assert path.read_bytes() == b"precious"


FULL = """
import resource, sys
import numpy as np
from swiftvideo.sdk.output import OutputError
from swiftvideo.sdk.video import VideoWriter

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with VideoWriter(sys.argv[1], 64, 64, 12) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (300, 64, 64, 3), np.uint8))
except OutputError as error:
    print(error)
writer.close()
print("closed")
"""


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_disk_that_is_full_is_an_error_and_no_crash(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "a.mp4"), str(limit)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    first, last = child.stdout.splitlines()
    assert "a.mp4': writing failed" in first and last == "closed"


@pytest.mark.parametrize(("code", "room"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_only_a_full_disk_is_told_to_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, room: bool
) -> None:
    def mux(packets: object) -> None:
        raise OSError(code, os.strerror(code))

    with VideoWriter(tmp_path / "a.mp4", 64, 64, 12) as writer:
        monkeypatch.setattr(writer, "_container", SimpleNamespace(mux=mux, close=writer._container.close))
        with pytest.raises(OutputError, match=r"writing failed, .*Errno") as caught:
            writer.write(colours(1))
    assert ("make room or choose another disk" in str(caught.value)) == room


@pytest.mark.parametrize("name", ["12:30.mp4", "file:a.mp4", "a%03d.mp4", "-a.mp4"])
def test_a_name_means_a_file_whatever_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, 64, 64, 12) as writer:
        writer.write(colours(3))
    assert [path.name for path in tmp_path.iterdir()] == [name] and len(read(tmp_path / name)) == 3


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 64, 32, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 64, 64, 3), np.float32),
    ],
)
def test_wrong_frames_are_refused_with_their_shape(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    with VideoWriter(tmp_path / "a.mp4", 64, 64, 12) as writer:
        with pytest.raises(SettingsError, match=str(list(frames.shape)).replace("[", r"\[")):
            writer.write(frames)


def test_writing_after_closing_is_refused(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 64, 64, 12)
    writer.close()
    with pytest.raises(ClosedError):
        writer.write(colours(1))


@pytest.mark.parametrize(
    ("width", "height", "fps", "said"),
    [
        (63, 64, 12, "video of 63x64"),
        (64, 63, 12, "video of 64x63"),
        (64, 0, 12, "video of 64x0"),
        (0, 64, 12, "video of 0x64"),
        (64.0, 64, 12, "video of 64.0x64"),
        (64, 64, 0, "fps is 0"),
        (64, 64, 12.5, r"video of 64x64 at 12\.5 frames per second: whole numbers"),
        (64, 64, "12", "at '12' frames"),
    ],
)
def test_sizes_that_cannot_be_encoded_are_refused(
    tmp_path: Path, width: Any, height: Any, fps: Any, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        VideoWriter(tmp_path / "a.mp4", width, height, fps)


def test_without_h264_another_encoder_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_codec() == "libx264"
    monkeypatch.setattr(video, "CODECS", {"no_such_encoder": {}, "mpeg4": {}})
    assert choose_codec() == "mpeg4"
    monkeypatch.setattr(video, "CODECS", {"no_such_encoder": {}})
    with pytest.raises(OutputError, match="no_such_encoder"):
        choose_codec()
