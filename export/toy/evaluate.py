"""Does the embedded model do what its prompts say? Random stories, judged from pixel statistics.

    python -m swiftvideo.export.toy.evaluate [--bundle FOLDER] [--stories 30] [--long 4] [--sheet FILE.png]
    [--json FILE]

Anything with the runtime's pipeline API can be evaluated: `pipeline.session(prompt=..., seed=...)` gives a
context manager that yields chunks with `frames` uint8 [n,64,64,3], and `session.prompt(text)` switches at
the next chunk.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .judge import judge
from .prompts import Attributes

HELD_OUT = 1_000_000
"""Seeds from here on are for evaluation only; training draws from small ones."""
Frames = NDArray[np.uint8]


class Chunk(Protocol):
    """What a session yields."""

    @property
    def frames(self) -> Frames:
        """uint8 [n,64,64,3], or with a leading batch of one."""
        ...


class Session(Protocol):
    """One video."""

    def __enter__(self) -> Session: ...
    def __exit__(self, *error: Any) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def prompt(self, text: str) -> Any:
        """Switch at the next chunk."""


class Pipeline(Protocol):
    """What makes sessions."""

    def session(self, prompt: str, seed: int) -> Any:
        """A new video."""


@dataclass(frozen=True, slots=True)
class Story:
    """Prompts by the chunk at which they begin."""

    seed: int
    prompts: Mapping[int, Attributes]
    chunks: int

    def asked(self, index: int) -> tuple[Attributes, int]:
        """What chunk `index` should show, and how many chunks ago that was asked for (0: just now)."""
        began = max(start for start in self.prompts if start <= index)
        return self.prompts[began], index - began


def random_story(seed: int, chunks: int = 12, switch: int = 6) -> Story:
    """Two random prompts, different in at least one attribute; the second begins at chunk `switch`."""
    rng = np.random.default_rng(HELD_OUT + seed)
    first = second = Attributes.random(rng)
    while second == first:
        second = Attributes.random(rng)
    return Story(seed, {0: first, switch: second}, chunks)


def play(pipeline: Pipeline, story: Story) -> list[Frames]:
    """The chunks of a story, uint8 [n,64,64,3] each."""
    shown: list[Frames] = []
    with pipeline.session(prompt=story.prompts[0].prompt(), seed=HELD_OUT + story.seed) as session:
        chunks = iter(session)
        for index in range(story.chunks):
            if index and index in story.prompts:
                session.prompt(story.prompts[index].prompt())
            frames = next(chunks).frames
            shown.append(frames[0] if frames.ndim == 5 else frames)
    return shown


class Score:
    """Counts of right answers by group and attribute."""

    def __init__(self) -> None:
        self._right: dict[str, list[list[bool]]] = {}

    def add(self, group: str, asked: Attributes, seen: Attributes) -> None:
        """Count one chunk."""
        row = [getattr(asked, name) == getattr(seen, name) for name in Attributes.names()]
        self._right.setdefault(group, []).append(row)

    def table(self) -> dict[str, dict[str, float]]:
        """Per group the percentage of right chunks by attribute, and `chunks`, how many there were."""
        result = {}
        for group, rows in self._right.items():
            shares = 100 * np.mean(rows, axis=0)
            result[group] = dict(zip(Attributes.names(), shares.tolist(), strict=True)) | {
                "chunks": len(rows)
            }
        return result


def evaluate(
    pipeline: Pipeline, stories: int = 30, long_videos: int = 0, log: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Score two-prompt stories, and the last chunks of videos of 100 chunks whose prompt changed at chunk 50.

    Groups: `before` the switch, `switch` (the first chunk after it, not part of the target), `after` (from
    the second chunk after it), `chunks 90 to 100`.
    """
    score = Score()
    for seed in range(stories):
        story = random_story(seed)
        for index, frames in enumerate(play(pipeline, story)):
            asked, age = story.asked(index)
            group = "before" if index < min(start for start in story.prompts if start) else "after"
            score.add("switch" if group == "after" and age == 0 else group, asked, judge(frames))
    for seed in range(long_videos):
        story = random_story(10_000 + seed, chunks=100, switch=50)
        for index, frames in enumerate(play(pipeline, story)):
            if index >= 89:
                score.add("chunks 90 to 100", story.asked(index)[0], judge(frames))
        log(f"long video {seed + 1} of {long_videos}")
    return score.table()


def markdown(table: Mapping[str, Mapping[str, float]]) -> str:
    """The table as Markdown, percentages with one digit."""
    names = Attributes.names()
    lines = ["| chunks | n | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for group, row in table.items():
        shares = " | ".join(f"{row[name]:.1f}" for name in names)
        lines.append(f"| {group} | {int(row['chunks'])} | {shares} |")
    return "\n".join(lines)


def contact_sheet(rows: Sequence[Sequence[Frames]], per_chunk: int = 1, zoom: int = 2) -> Frames:
    """Rows of chunks as one picture, `per_chunk` frames of each side by side: uint8 [height,width,3]."""
    pictures = []
    for chunks in rows:
        picked = [chunk[np.linspace(0, len(chunk) - 1, per_chunk + 1).astype(int)[1:]] for chunk in chunks]
        pictures.append(np.concatenate(list(np.concatenate(picked)), axis=1))
    sheet: Frames = np.concatenate(pictures).repeat(zoom, 0).repeat(zoom, 1)
    return sheet


def save_png(path: Path, picture: Frames) -> None:
    """Write uint8 [height,width,3]."""
    from PIL import Image

    Image.fromarray(picture).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a bundle on the runtime (the embedded one by default) and print the table."""
    parser = argparse.ArgumentParser(prog="python -m swiftvideo.export.toy.evaluate")
    parser.add_argument("--bundle", type=Path, help="a bundle's folder; the embedded one by default")
    parser.add_argument(
        "--state", type=Path, help="a training folder instead: judged with the plain torch loop"
    )
    parser.add_argument("--stories", type=int, default=30)
    parser.add_argument("--long", type=int, default=0, help="videos of 100 chunks")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first eight stories")
    parser.add_argument("--json", type=Path, help="write the table as JSON")
    options = parser.parse_args(arguments)
    pipeline: Any
    if options.state:
        from .train import load_trained

        pipeline = load_trained(options.state)
    else:
        from swiftvideo.runtime import load

        pipeline = load(options.bundle)
    table = evaluate(pipeline, options.stories, options.long)
    print(markdown(table))
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    if options.sheet:
        stories = [random_story(seed) for seed in range(8)]
        save_png(options.sheet, contact_sheet([play(pipeline, story) for story in stories]))
        for story in stories:
            print(" -> ".join(asked.prompt() for asked in story.prompts.values()))


if __name__ == "__main__":
    main()
