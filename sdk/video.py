"""MP4 files, written so that an interrupted run leaves a file that plays."""

from __future__ import annotations

import errno
import operator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray

from swiftvideo.runtime.errors import ClosedError, SettingsError

from .output import OutputError, check_output

Frames = NDArray[np.uint8]
"""RGB video: uint8 [n,H,W,3]."""

CODECS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "22", "preset": "veryfast", "x264-params": "mbtree=0"},
    "libopenh264": {"rc_mode": "quality"},
    "mpeg4": {"qscale": "3"},
}
"""Encoders in order of preference with their options: two of H.264, then MPEG-4 part 2, which every FFmpeg has.

x264's macroblock tree reads memory that it never wrote, so with it the same frames give other files. Without it,
crf 22 is a little better than crf 18 was with it.
"""

_BT709 = 1


def choose_codec() -> str:
    """The first of `CODECS` that this PyAV was built with.

    Raises:
        OutputError: none of them is there.
    """
    for name in CODECS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise OutputError(
        f"this PyAV ({av.__version__}) has none of the encoders {', '.join(CODECS)}: "
        "install the wheel, pip install --force-reinstall av"
    )


def _reason(error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return f"{error}" + (": make room or choose another disk" if full else "")


class VideoWriter:
    """Writes RGB frames to an MP4 file (yuv420p, BT.709), replacing a file of that name.

    The file grows in fragments of one second and becomes an ordinary MP4 when it is closed, so what was written
    before a crash still plays.

    Args:
        path: ends in `.mp4`.
        width, height: pixels, both even.
        fps: frames per second.
        codec: an FFmpeg encoder; None chooses (`choose_codec`).

    Raises:
        UsageError: the path's suffix, odd sizes, or a rate that is no whole number.
        OutputError: the folder is missing or not writable, or the encoder is not there.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: int, codec: str | None = None) -> None:
        self.path = check_output(path, (".mp4",))
        try:
            self.width, self.height, self.fps = (operator.index(value) for value in (width, height, fps))
        except TypeError as error:
            raise SettingsError(
                f"video of {width}x{height} at {fps!r} frames per second: whole numbers are needed"
            ) from error
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise SettingsError(f"video of {width}x{height}: both sizes must be even and at least 2")
        if fps < 1:
            raise SettingsError(f"fps is {fps}: at least 1 is needed")
        self.codec = codec or choose_codec()
        self.frames = 0
        """Frames written so far."""
        self._closed = self._failed = False
        self._existed = self.path.exists()  # FFmpeg opens the file only with the first packet
        try:
            self._container = av.open(
                f"file:{self.path}",  # else FFmpeg takes what stands before a colon for a protocol
                "w",
                format="mp4",
                options={"movflags": "hybrid_fragmented", "flush_packets": "1"},
            )
            self._stream = self._open_stream()
        except (FFmpegError, ValueError, OSError) as error:
            raise OutputError(f"{str(self.path)!r} cannot be written with {self.codec}: {error}") from error

    def _open_stream(self) -> VideoStream:
        stream = self._container.add_stream(
            self.codec, rate=self.fps, options=dict(CODECS.get(self.codec, {}))
        )
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        context.gop_size = self.fps
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        return stream

    def write(self, frames: Frames | memoryview) -> None:
        """Append frames, uint8 [n,H,W,3], as a chunk of either kind has them.

        Raises:
            SettingsError: another shape or dtype.
            ClosedError: the writer was closed.
            OutputError: the disk is full, or the encoder failed.
        """
        if self._closed:
            raise ClosedError(f"{str(self.path)!r} was closed: open another VideoWriter")
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise SettingsError(
                f"frames are {frames.dtype} {list(frames.shape)}: uint8 [n, {self.height}, {self.width}, 3] is needed"
            )
        try:
            for image in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    src_color_range=ColorRange.JPEG,
                    dst_color_range=ColorRange.MPEG,
                )
                frame.pts = self.frames
                frame.time_base = Fraction(1, self.fps)
                self._container.mux(self._stream.encode(frame))
                self.frames += 1
        except (FFmpegError, OSError) as error:
            self._failed = True
            raise OutputError(f"{str(self.path)!r}: writing failed, {_reason(error)}") from error

    def close(self) -> None:
        """Finish the file; without any frame none is left, and one that was there stays. Twice is fine.

        Raises OutputError, unless `write` has: what went wrong there makes this fail, too.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self.frames and not self._failed:  # after a failure it would crash
                self._container.mux(self._stream.encode(None))
            self._container.close()
        except (FFmpegError, OSError) as error:
            if not self._failed:
                raise OutputError(f"{str(self.path)!r}: closing failed, {_reason(error)}") from error
        finally:
            if not self.frames and not self._existed:
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
