"""`swiftvideo generate --server`: a story made elsewhere, written here."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import typer

from swiftvideo.runtime.errors import UsageError
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.story import Story
from swiftvideo.sdk.video import VideoWriter
from swiftvideo.v1 import generation_pb2 as pb


def first_chunk(second: float, geometry: pb.Geometry) -> int:
    """The first chunk that begins at or after a second of the video."""
    frame = round(second * geometry.fps)
    if frame <= 0:
        return 0
    return 1 + max(0, -(-(frame - geometry.first_chunk_frames) // geometry.chunk_frames))


def generate(client: Client, story: Story, out: Path, as_json: bool = False) -> None:
    """Make `story` on a server into the MP4 file `out`; says what it did on stdout.

    Raises ServiceError, UsageError or OutputError.
    """
    geometry = client.describe().geometry
    planned = max(1, round(story.seconds * geometry.fps))
    chunks = first_chunk(planned / geometry.fps, geometry)
    written, switches, begin = 0, [], time.perf_counter()
    first, *others = story.cues
    video = client.generate(first.prompt, story.seed, policy=story.policy, chunks=chunks)
    with video, VideoWriter(out, geometry.width, geometry.height, geometry.fps) as writer:
        texts = {video.prompt(cue.prompt, first_chunk(cue.at, geometry)): cue.prompt for cue in others}
        for chunk in video:
            for id, reason in video.state.rejected.items():
                raise UsageError(f"prompt {texts[id]!r} was refused: {reason}")
            frames = np.asarray(chunk.frames)[: planned - written]
            writer.write(frames)
            written += len(frames)
            if chunk.mode:
                shown = chunk.first_frame / geometry.fps
                switches.append(
                    {
                        "prompt": texts[chunk.prompt_id],
                        "shown": shown,
                        "mode": chunk.mode,
                        "rho": chunk.rho,
                    }
                )
    seconds = time.perf_counter() - begin
    report = {
        "video": str(out),
        "frames": written,
        "server": client.address,
        "elapsed_seconds": round(seconds, 6),
        "frames_per_second": round(written / seconds, 3),
        "switches": switches,
    }
    if as_json:
        typer.echo(json.dumps(report))
        return
    for switch in switches:
        typer.echo(f"{switch['shown']:7.2f} s  {switch['prompt']}  ({switch['mode']})")
    typer.echo(f"{out}: {written} frames from {client.address} at {written / seconds:.1f} frames per second")
