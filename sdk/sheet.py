"""Contact sheets: one row of frames per prompt, its text above, the switch marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .output import OutputError, check_output

COLUMNS = 8
SMALLEST_TILE, LARGEST_TILE = 112, 240
"""Widths in pixels between which frames are enlarged or reduced."""
TEXT, NOTE = 15, 12
"""Font sizes in pixels."""
GAP, MARGIN, BAR = 4, 14, 6

_PAPER, _INK, _FAINT, _SWITCH = (250, 250, 248), (20, 20, 24), (110, 110, 116), (214, 48, 49)


@dataclass(slots=True)
class Row:
    """One prompt's frames, thinned while they come so that memory stays small."""

    prompt: str
    note: str = ""
    """Small print, such as when and how the prompt took over."""
    switched: bool = False
    """Whether the row begins with a switch."""
    _kept: list[NDArray[np.uint8]] = field(default_factory=list)
    _seen: int = 0
    _stride: int = 1

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Take the next frames, uint8 [n,H,W,3]."""
        for frame in frames:
            if self._seen % self._stride == 0:
                self._kept.append(frame.copy())
            self._seen += 1
            if len(self._kept) > 8 * COLUMNS:
                del self._kept[1::2]
                self._stride *= 2

    def sample(self, count: int) -> list[NDArray[np.uint8]]:
        """At most `count` frames, evenly spread, the first one included."""
        picks = np.linspace(0, len(self._kept) - 1, min(count, len(self._kept))).round().astype(int)
        return [self._kept[i] for i in picks]


def draw(rows: Sequence[Row], columns: int = COLUMNS) -> NDArray[np.uint8]:
    """The sheet, uint8 [H,W,3], of rows that have frames.

    Raises:
        OutputError: no row has a frame.
    """
    tiles = [(row, row.sample(columns)) for row in rows]
    tiles = [(row, frames) for row, frames in tiles if frames]
    if not tiles:
        raise OutputError("a contact sheet without frames: nothing was made yet")
    height, width, _ = tiles[0][1][0].shape
    scale = max(1, -(-SMALLEST_TILE // width)) if width < SMALLEST_TILE else min(1.0, LARGEST_TILE / width)
    tile = (round(width * scale), round(height * scale))
    font, small = ImageFont.load_default(TEXT), ImageFont.load_default(NOTE)
    inner = BAR + GAP + columns * (tile[0] + GAP) - GAP
    texts = [_wrap(row.prompt, font, inner) for row, _ in tiles]
    line, note_line = TEXT + 5, NOTE + 5
    heights = [
        len(text) * line + (note_line if row.note else 0) + tile[1] + MARGIN
        for text, (row, _) in zip(texts, tiles, strict=True)
    ]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for text, (row, frames) in zip(texts, tiles, strict=True):
        for words in text:
            pen.text((MARGIN, y), words, _INK, font)
            y += line
        if row.note:
            pen.text((MARGIN, y), row.note, _SWITCH if row.switched else _FAINT, small)
            y += note_line
        if row.switched:
            pen.rectangle((MARGIN, y, MARGIN + BAR - 1, y + tile[1] - 1), _SWITCH)
        how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        for column, frame in enumerate(frames):
            x = MARGIN + BAR + GAP + column * (tile[0] + GAP)
            sheet.paste(Image.fromarray(frame).resize(tile, how), (x, y))
        y += tile[1] + MARGIN
    return np.asarray(sheet)


def save(path: str | Path, rows: Sequence[Row], columns: int = COLUMNS) -> Path:
    """Draw the sheet into a PNG file, replacing one of that name.

    Raises:
        UsageError, OutputError: as `check_output` and `draw`.
    """
    path = check_output(path, (".png",))
    try:
        Image.fromarray(draw(rows, columns)).save(path)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error}") from error
    return path


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of `text` that fit into `width` pixels; a single long word keeps a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
