"""Contact sheets, by their pixels."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from swiftvideo.sdk import sheet
from swiftvideo.sdk.output import OutputError

RED, BLUE = (220, 20, 20), (20, 20, 220)


def plain(colour: tuple[int, int, int], count: int = 20, size: int = 64) -> NDArray[np.uint8]:
    return np.broadcast_to(np.array(colour, np.uint8), (count, size, size, 3))


def rows() -> list[sheet.Row]:
    first, second = sheet.Row("a red thing", "from 0.00 s"), sheet.Row("a blue thing", "switch at 4 s", True)
    first.add(plain(RED))
    second.add(plain(BLUE))
    return [first, second]


def share(image: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.float64]:
    """Share of each line of the image that has exactly this colour."""
    result: NDArray[np.float64] = (image == np.array(colour, np.uint8)).all(-1).mean(1)
    return result


def test_each_prompt_has_its_row_and_its_text_above_it() -> None:
    image = sheet.draw(rows())
    red, blue = np.flatnonzero(share(image, RED) > 0.8), np.flatnonzero(share(image, BLUE) > 0.8)
    assert len(red) == len(blue) >= sheet.SMALLEST_TILE
    assert red.max() < blue.min()
    dark = (image.max(-1) < 90).sum(1)
    assert dark[: red.min()].sum() > 100, "the first prompt's text"
    assert dark[red.max() + 1 : blue.min()].sum() > 100, "the second prompt's text"


def test_only_a_switch_is_marked() -> None:
    image = sheet.draw(rows())
    marked = np.flatnonzero((image[:, sheet.MARGIN + 1] == sheet._SWITCH).all(-1))
    blue = np.flatnonzero(share(image, BLUE) > 0.8)
    assert len(marked) >= len(blue)
    assert marked.min() >= np.flatnonzero(share(image, RED) > 0.8).max()


def test_different_texts_draw_different_pixels() -> None:
    other = rows()
    other[0].prompt = "a red king"
    assert (sheet.draw(rows()) != sheet.draw(other)).any()


def test_long_prompts_are_wrapped_inside_the_sheet() -> None:
    long = rows()
    long[0].prompt = "many words about a circle " * 20
    before, after = sheet.draw(rows()), sheet.draw(long)
    assert after.shape[1] == before.shape[1] and after.shape[0] > before.shape[0]
    assert (after[:, -sheet.MARGIN // 2 :] == sheet._PAPER).all()


def test_frames_are_spread_over_the_whole_segment_in_bounded_memory() -> None:
    row = sheet.Row("counting")
    for start in range(0, 1000, 10):
        numbers = np.arange(start, start + 10)
        row.add(np.broadcast_to((numbers // 4).astype(np.uint8)[:, None, None, None], (10, 8, 8, 3)))
    picked = np.array([int(frame[0, 0, 0]) * 4 for frame in row.sample(8)])
    assert len(row._kept) <= 8 * sheet.COLUMNS
    assert picked[0] == 0 and picked[-1] > 900
    assert np.abs(np.diff(picked) - np.diff(picked).mean()).max() < 40


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(60, 120, (60, 120)), (32, 64, (64, 128)), (30, 40, (90, 120)), (480, 960, (120, 240))],
)
def test_small_frames_are_enlarged_by_whole_numbers_and_large_ones_reduced(
    height: int, width: int, tile: tuple[int, int]
) -> None:
    row = sheet.Row("flat")
    row.add(np.broadcast_to(np.array(RED, np.uint8), (2, height, width, 3)))
    red = (sheet.draw([row], 2) == np.array(RED, np.uint8)).all(-1)
    assert (red.any(1).sum(), red.any(0).sum()) == (tile[0], 2 * tile[1])


def test_the_file_is_the_drawing(tmp_path: Path) -> None:
    path = sheet.save(tmp_path / "a.png", rows())
    with av.open(str(path)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert (image == sheet.draw(rows())).all()


def test_a_sheet_without_frames_is_an_error() -> None:
    with pytest.raises(OutputError, match="nothing"):
        sheet.draw([sheet.Row("nothing came")])
