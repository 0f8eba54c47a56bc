"""A story to an MP4 file and a contact sheet, chunk by chunk, stoppable at any time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftvideo.runtime import EngineError, Pipeline

from . import sheet
from .interrupts import Interrupts
from .output import check_output
from .story import Shot, Story, schedule, video_frames
from .video import Frames, VideoWriter


@dataclass(frozen=True, slots=True)
class Switch:
    """A prompt that took over."""

    prompt: str
    asked: float
    """Second that the story asks for."""
    shown: float
    """Second of the first frame under the prompt: a chunk boundary."""
    frame: int
    """That video frame."""
    mode: str
    """How (`Chunk.mode`)."""
    rho: float | None
    """Measured strength, 0 to 1."""


@dataclass(slots=True)
class Report:
    """What was made. `interrupted` is the signal's number, or 0."""

    video: Path
    width: int
    height: int
    fps: int
    seed: int
    policy: str | None
    """None: the server's."""
    engine: str
    codec: str = ""
    server: str | None = None
    """Where it was made, unless here."""
    sheet: Path | None = None
    planned: int = 0
    """Video frames asked for."""
    frames: int = 0
    """Video frames written."""
    elapsed: float = 0.0
    """Wall-clock seconds of making and writing them, without loading."""
    interrupted: int = 0
    switches: list[Switch] = field(default_factory=list)
    prompt: str = ""
    """The running one."""
    windows: list[int] = field(default_factory=list)
    """Of each chunk."""

    @property
    def rate(self) -> float:
        """Frames made per second, decoding and writing included."""
        return self.frames / self.elapsed if self.elapsed else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values for machines; the keys are documented in docs/cli.md."""
        return {
            "video": str(self.video) if self.frames else None,
            "contact_sheet": str(self.sheet) if self.sheet else None,
            "frames": self.frames,
            "frames_planned": self.planned,
            "seconds": round(self.frames / self.fps, 6),
            "width": self.width,
            "height": self.height,
            "fps": self.fps,
            "codec": self.codec,
            "seed": self.seed,
            "policy": self.policy,
            "engine": self.engine,
            "server": self.server,
            "elapsed_seconds": round(self.elapsed, 6),
            "frames_per_second": round(self.rate, 3),
            "interrupted": bool(self.interrupted),
            "windows": self.windows,
            "switches": [
                {
                    "prompt": s.prompt,
                    "asked": s.asked,
                    "shown": s.shown,
                    "frame": s.frame,
                    "mode": s.mode,
                    "rho": s.rho,
                }
                for s in self.switches
            ],
        }


Item = tuple[int, Frames, Any]
"""Number of the prompt that made a chunk, as the shots count; its frames; the chunk."""
OnChunk = Callable[[Any, Report], None]


def generate(
    pipeline: Pipeline,
    story: Story,
    out: str | Path,
    contact_sheet: str | Path | None = None,
    on_chunk: OnChunk | None = None,
) -> Report:
    """Make `story` into the MP4 file `out`, and a PNG `contact_sheet` if asked for.

    A prompt takes effect at the first chunk boundary at or after its time (`story.schedule`); the video has exactly
    round(seconds * fps) frames. SIGINT and SIGTERM end it early: the report says so and the files hold what was made.
    So it is when the engine fails, but then the error is raised after the files were closed.

    on_chunk: called after each chunk with it and the report so far.

    Raises:
        UsageError: the story does not fit the model, or a file name is of no use.
        OutputError: a file cannot be written.
        EngineError: the engine failed.
    """
    geometry = pipeline.geometry
    shots = schedule(story, geometry)

    @contextmanager
    def chunks() -> Iterator[Iterator[Item]]:
        with pipeline.session(story.cues[0].prompt, story.seed, story.policy) as session:
            for shot in shots[1:]:
                session.prompt(shot.cue.prompt, at_frame=shot.boundary)
            yield ((chunk.prompt_id, chunk.frames, chunk) for chunk in session)

    report = Report(
        *(Path(out), geometry.width, geometry.height, geometry.fps, story.seed),
        *(story.policy or pipeline.settings.policy, pipeline.engine.name),
        planned=video_frames(story, geometry),
    )
    return record(chunks(), shots, report, contact_sheet, on_chunk)


def record(
    source: AbstractContextManager[Iterator[Item]],
    shots: tuple[Shot, ...],
    report: Report,
    contact_sheet: str | Path | None = None,
    on_chunk: OnChunk | None = None,
) -> Report:
    """Write what `source` makes to `report.video`, and tell the rest of the report.

    Raises as `generate`, and what the source raises.
    """
    sheet_path = None if contact_sheet is None else check_output(contact_sheet, (".png",))
    rows = [sheet.Row(shot.cue.prompt, f"from {shot.first_frame / report.fps:.2f} s") for shot in shots]
    with Interrupts() as interrupts:
        writer: VideoWriter | None = None
        try:
            with source as items:
                with interrupts.shield():
                    writer = VideoWriter(report.video, report.width, report.height, report.fps)
                    report.codec = writer.codec
                begin = time.perf_counter()
                while report.frames < report.planned:
                    item = next(items, None)
                    if item is None:
                        raise EngineError(f"the video ended after {report.frames} of {report.planned} frames")
                    with interrupts.shield():
                        _take(item, report, writer, shots, rows)
                        report.elapsed = time.perf_counter() - begin
                        if on_chunk is not None:
                            on_chunk(item[2], report)
        except KeyboardInterrupt:
            if writer is None:
                raise
            report.interrupted = interrupts.received or signal.SIGINT
        finally:
            with interrupts.shield(last=True):
                _finish(writer, sheet_path, rows)
        if report.frames:
            report.sheet = sheet_path
    return report


def _take(
    item: Item, report: Report, writer: VideoWriter, shots: tuple[Shot, ...], rows: list[sheet.Row]
) -> None:
    """Write a chunk's frames, the last ones cut to what was planned, and note its switch."""
    number, frames, chunk = item
    frames = frames[: report.planned - report.frames]
    writer.write(frames)
    report.frames = writer.frames
    report.prompt = shots[number].cue.prompt
    report.windows.append(chunk.window)
    row = rows[number]
    row.add(frames)
    if chunk.mode:
        cue, shown = shots[number].cue, chunk.first_frame / report.fps
        report.switches.append(Switch(cue.prompt, cue.at, shown, chunk.first_frame, chunk.mode, chunk.rho))
        strength = "" if chunk.rho is None else f", rho {chunk.rho:.2f}"
        row.switched, row.note = True, f"switch at {shown:.2f} s: {chunk.mode}{strength}"


def _finish(writer: VideoWriter | None, path: Path | None, rows: list[sheet.Row]) -> None:
    if writer is None:
        return
    try:
        writer.close()
    finally:
        if path is not None and writer.frames:
            sheet.save(path, rows)
