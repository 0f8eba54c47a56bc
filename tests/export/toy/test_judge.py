"""The judge is right on what was drawn, also when it is blurred and noisy."""

import numpy as np
import pytest

from swiftvideo.export.toy import prompts, scenes
from swiftvideo.export.toy.judge import centres, judge, segment
from swiftvideo.export.toy.prompts import Attributes


def blurred(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of 1.2 pixels and noise of 8 levels: worse than 24 dB."""
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 1.2) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(frames, ((0, 0), (3, 3), (3, 3), (0, 0)), "edge")
    padded = sum(weight * padded[:, shift : shift + 64] for shift, weight in enumerate(kernel))
    soft = sum(weight * padded[:, :, shift : shift + 64] for shift, weight in enumerate(kernel))
    return np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255)


def test_every_attribute_of_drawn_stories_is_recognised() -> None:
    rng = np.random.default_rng(11)
    for _ in range(12):
        frames, each = scenes.story(rng, 4)
        first = 0
        for number, asked in enumerate(each):
            count = scenes.CHUNK_FRAMES if number else scenes.FIRST_FRAMES
            chunk = frames[first : first + count]
            first += count
            assert judge(chunk.astype(np.uint8)) == asked


def test_blur_and_noise_do_not_mislead_it() -> None:
    rng = np.random.default_rng(12)
    for _ in range(25):
        asked = Attributes.random(rng)
        chunk = scenes.World(rng).frames(asked, scenes.CHUNK_FRAMES)
        assert judge(blurred(chunk, rng).astype(np.uint8)) == asked


@pytest.mark.parametrize("name", prompts.BACKGROUNDS)
def test_an_empty_picture_has_a_background_and_nothing_else(name: str) -> None:
    frames = np.broadcast_to(scenes.background(name), (12, 64, 64, 3)).astype(np.uint8)
    assert judge(frames) == Attributes("", "", "", name)


def test_a_grey_between_the_backgrounds_is_none_of_them() -> None:
    assert judge(np.full((12, 64, 64, 3), 185, np.uint8)).background == ""


def test_positions_go_round_the_border() -> None:
    shape = scenes.render(
        Attributes("red", "circle", "left", "snow"), 16.0, np.array([[1.0, 63.0], [32.0, 0.5]])
    )
    assert centres(segment(shape.astype(np.float64))) == pytest.approx(
        np.array([[1.0, 63.0], [32.0, 0.5]]), abs=0.3
    )
