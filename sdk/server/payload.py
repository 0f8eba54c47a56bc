"""Frames to bytes. Every chunk is packed by itself, so a resumed stream has the same bytes as an uninterrupted one."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.v1 import generation_pb2 as pb

Frames = NDArray[np.uint8]

JPEG_QUALITY = 90
H264_OPTIONS = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}


def encodings() -> list[pb.Encoding]:
    """What this machine can make."""
    found = [pb.ENCODING_RAW]
    try:
        import PIL.Image  # noqa: F401

        found.append(pb.ENCODING_JPEG)
    except ModuleNotFoundError:
        pass
    import av

    if "libx264" in av.codecs_available:
        found.append(pb.ENCODING_H264)
    return found


def checked(number: int) -> pb.Encoding:
    """The encoding of a number, raw where it is unspecified.

    Raises SettingsError for one that is unknown or cannot be made here.
    """
    if number == pb.ENCODING_UNSPECIFIED:
        return pb.ENCODING_RAW
    known = (pb.ENCODING_RAW, pb.ENCODING_JPEG, pb.ENCODING_H264)
    found = next((encoding for encoding in known if encoding == number), None)
    if found is None:
        raise SettingsError(f"encoding is {number}: use ENCODING_RAW, ENCODING_JPEG or ENCODING_H264")
    if found not in encodings():
        raise SettingsError(
            f"this server cannot make {pb.Encoding.Name(found)}: Describe lists what it can make"
        )
    return found


def pack(frames: Frames, encoding: pb.Encoding, fps: int) -> list[bytes]:
    """Payloads of frames, uint8 [n,H,W,3], as the protocol's `Encoding` says."""
    if encoding == pb.ENCODING_JPEG:
        return [_jpeg(frame) for frame in frames]
    if encoding == pb.ENCODING_H264:
        return [_h264(frames, fps)]
    return [frames.tobytes()]


def _jpeg(frame: Frames) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def _h264(frames: Frames, fps: int) -> bytes:
    import av

    codec: Any = av.CodecContext.create("libx264", "w")
    codec.height, codec.width = frames.shape[1:3]
    codec.pix_fmt, codec.time_base, codec.framerate = "yuv420p", Fraction(1, fps), Fraction(fps)
    codec.gop_size, codec.max_b_frames, codec.thread_count = len(frames), 0, 1
    codec.options = H264_OPTIONS
    packets = []
    for number, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = number
        packets += codec.encode(frame)
    packets += codec.encode(None)
    return b"".join(map(bytes, packets))
