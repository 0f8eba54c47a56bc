"""`swiftvideo generate --server`: a story made elsewhere, written here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swiftvideo.runtime import PromptError
from swiftvideo.runtime.geometry import video_frames as latent_video_frames
from swiftvideo.v1 import generation_pb2 as pb

from .client import Client, Video
from .generate import Item, OnChunk, Report, record
from .story import Shot, Story, schedule, video_frames

AHEAD = 32
"""Prompts that are sent before their turn: a chunk's window depends on the next one, and servers let 64 wait."""


@dataclass(frozen=True, slots=True)
class RemoteClock:
    """A server's model as `story.schedule` asks for it."""

    fps: int
    chunk: int
    temporal_stride: int

    @classmethod
    def of(cls, geometry: pb.Geometry) -> RemoteClock:
        """A video's very first latent frame is one frame, any other `temporal_stride`."""
        stride = geometry.chunk_frames - geometry.first_chunk_frames + 1
        return cls(geometry.fps, geometry.chunk_frames // stride, stride)

    def video_frames(self, start: int, frames: int) -> int:
        """As `Geometry.video_frames`."""
        return latent_video_frames(start, frames, self.temporal_stride)


def generate_on(
    client: Client,
    story: Story,
    out: str | Path,
    contact_sheet: str | Path | None = None,
    on_chunk: OnChunk | None = None,
) -> Report:
    """`generate.generate` on a server, with the same files and the same report.

    Raises ServiceError; UsageError where the story does not fit the model; OutputError.
    """
    about = client.describe()
    geometry, clock = about.geometry, RemoteClock.of(about.geometry)
    shots, planned = schedule(story, clock), video_frames(story, clock)
    count = 1 + max(0, -(-(planned - geometry.first_chunk_frames) // geometry.chunk_frames))

    @contextmanager
    def chunks() -> Iterator[Iterator[Item]]:
        first, ahead = story.cues[0].prompt, [_asked(shot, clock) for shot in shots[1 : 1 + AHEAD]]
        with client.generate(first, story.seed, prompts=ahead, policy=story.policy, chunks=count) as video:
            yield _items(video, shots, clock)

    report = Report(
        *(Path(out), geometry.width, geometry.height, geometry.fps, story.seed, story.policy, about.engine),
        server=client.address,
        planned=planned,
    )
    return record(chunks(), shots, report, contact_sheet, on_chunk)


def _asked(shot: Shot, clock: RemoteClock) -> tuple[str, int]:
    """A prompt and its chunk."""
    return shot.cue.prompt, shot.boundary // clock.chunk


def _items(video: Video, shots: tuple[Shot, ...], clock: RemoteClock) -> Iterator[Item]:
    """Chunks, which are never made before their next prompt is known: the server is ahead by fewer than `AHEAD`."""
    ids, number = ["", *video.state.prompts], 0
    while True:
        for shot in shots[len(ids) : number + 1 + AHEAD]:
            ids.append(video.prompt(*_asked(shot, clock)))
        chunk = next(video, None)
        for id, reason in video.state.rejected.items():
            raise PromptError(f"prompt {shots[ids.index(id)].cue.prompt!r} was refused: {reason}")
        if chunk is None:
            return
        number = ids.index(chunk.prompt_id, number)
        yield number, np.asarray(chunk.frames), chunk
