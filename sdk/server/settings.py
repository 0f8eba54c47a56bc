"""The protocol's settings to the runtime's."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from swiftvideo.runtime import Geometry, PolicySettings
from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.geometry import LIMIT
from swiftvideo.v1 import generation_pb2 as pb

_T = TypeVar("_T")

KINDS = {
    pb.POLICY_KIND_SWIFT: "swift",
    pb.POLICY_KIND_RECACHE: "recache",
    pb.POLICY_KIND_KEEP: "keep",
    pb.POLICY_KIND_CUT: "cut",
}


def policy(message: pb.PolicySettings, base: PolicySettings) -> PolicySettings:
    """`base` with what the message changes. Raises SettingsError where a value is out of range."""
    changes: dict[str, Any] = {
        "bridge": _changed(base.bridge, message.bridge),
        "window": _changed(base.window, message.window),
        "anchors": _changed(base.anchors, message.anchors),
    }
    if message.kind:
        if message.kind not in KINDS:
            raise SettingsError(f"policy.kind is {message.kind}: use one of {', '.join(KINDS.values())}")
        changes["policy"] = KINDS[message.kind]
    if message.HasField("global_sink"):
        changes["global_sink"] = message.global_sink
    return dataclasses.replace(base, **changes)


def _changed(part: _T, message: Any) -> _T:
    given = {field.name: value for field, value in message.ListFields()}
    for name, value in given.items():
        if isinstance(value, float) and not abs(value) < LIMIT:
            raise SettingsError(f"{name} is {value}: use a number below a million")
        if isinstance(value, int) and value > 1 << 20:
            raise SettingsError(f"{name} is {value}: use a smaller number")
    return dataclasses.replace(part, **given)  # type: ignore[type-var]


def geometry(source: Geometry) -> pb.Geometry:
    """Sizes of the video."""
    return pb.Geometry(
        width=source.width,
        height=source.height,
        fps=source.fps,
        chunk_frames=source.video_frames(1, source.chunk),
        first_chunk_frames=source.video_frames(0, source.chunk),
    )
