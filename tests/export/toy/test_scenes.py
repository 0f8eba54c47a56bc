"""Drawn clips do what their attributes say."""

import numpy as np
import pytest

from swiftvideo.export.toy import prompts, scenes
from swiftvideo.export.toy.judge import centres, segment
from swiftvideo.export.toy.prompts import Attributes


def test_a_seed_gives_one_story() -> None:
    (a, each), (b, same) = (scenes.story(np.random.default_rng(3), 3) for _ in range(2))
    assert a.shape == (9 + 12 + 12, 64, 64, 3)
    assert each == same
    np.testing.assert_array_equal(a, b)


def test_position_goes_on_when_attributes_change() -> None:
    rng = np.random.default_rng(4)
    world = scenes.World(rng)
    before = world.frames(Attributes("red", "circle", "right", "night"), 12)
    after = world.frames(Attributes("blue", "circle", "up", "fog"), 12)
    places = centres(segment(np.concatenate([before[-1:], after[:1]]).astype(np.float64)))
    step = (places[1] - places[0] + 32) % 64 - 32
    assert step == pytest.approx([scenes.SPEED, 0.0], abs=0.2)


def test_bouncing_stays_inside() -> None:
    for seed in range(5):
        world = scenes.World(np.random.default_rng(seed))
        masks = segment(
            world.frames(Attributes("cyan", "circle", "bouncing", "dawn"), 120).astype(np.float64)
        )
        touched = masks[:, [0, -1]].sum() + masks[:, :, [0, -1]].sum()
        assert touched < 12 * 120  # a circle that is tangent to the border touches few of its pixels
        assert masks.sum((1, 2)).min() > 0.95 * masks.sum((1, 2)).max()


def test_colours_are_saturated_and_backgrounds_neutral() -> None:
    for colour in scenes.COLOURS.values():
        assert max(colour) - min(colour) >= 120
    for name in prompts.BACKGROUNDS:
        picture = scenes.background(name)
        assert (picture.max(-1) - picture.min(-1)).max() <= 20
