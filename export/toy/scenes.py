"""Procedurally drawn clips: one saturated shape that moves over a neutral background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .prompts import Attributes

Frames = NDArray[np.float32]

SIDE = 64
FIRST_FRAMES = 9
"""Video frames of the first chunk: the first latent frame is one frame, the next two are four each."""
CHUNK_FRAMES = 12
SPEED = 1.25
"""Pixels a frame."""
# fmt: off
COLOURS = {
    "red": (225, 40, 40), "orange": (255, 145, 20), "yellow": (245, 230, 50), "green": (40, 170, 60),
    "cyan": (60, 215, 225), "blue": (50, 80, 235), "purple": (145, 50, 190), "pink": (255, 130, 195),
}
VELOCITIES = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "bouncing": (1.0, 0.8), "still": (0.0, 0.0),
}
BACKGROUNDS = {  # top row, bottom row
    "night": ((14, 16, 34), (14, 16, 34)), "snow": ((240, 242, 246), (240, 242, 246)),
    "fog": ((125, 128, 132), (125, 128, 132)), "dawn": ((20, 22, 40), (215, 215, 222)),
}
# fmt: on
_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def signed_distance(shape: str, radius: float, dx: Frames, dy: Frames) -> Frames:
    """Approximate distance in pixels to the outline, negative inside. `dx`, `dy`: offsets from the centre."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = np.maximum(ax, ay) - 0.85 * radius
    elif shape == "triangle":  # apex up
        distance = np.maximum(0.894 * ax - 0.447 * (dy + radius), dy - 0.85 * radius)
    else:
        upright = np.maximum(ax - 0.34 * radius, ay - radius)
        distance = np.minimum(upright, np.maximum(ax - radius, ay - 0.34 * radius))
    result: Frames = distance.astype(np.float32)
    return result


def background(name: str) -> Frames:
    """The empty background, float32 [64, 64, 3] in 0..255."""
    top, bottom = (np.array(colour, np.float32) for colour in BACKGROUNDS[name])
    picture: Frames = (top + (bottom - top) * (_ROWS[..., None] / SIDE)).astype(np.float32)
    return picture


def render(attributes: Attributes, radius: float, positions: NDArray[np.float64]) -> Frames:
    """One frame per (x, y) of `positions` [n, 2]: float32 [n, 64, 64, 3] in 0..255, edges anti-aliased."""
    places = positions.astype(np.float32)
    dx = _COLUMNS[None] - places[:, 0, None, None]
    dy = _ROWS[None] - places[:, 1, None, None]
    if attributes.motion != "bouncing":  # leaves at one side and enters at the other
        dx = (dx + SIDE / 2) % SIDE - SIDE / 2
        dy = (dy + SIDE / 2) % SIDE - SIDE / 2
    cover = np.clip(0.5 - signed_distance(attributes.shape, radius, dx, dy), 0, 1)[..., None]
    colour = np.array(COLOURS[attributes.colour], np.float32)
    frames: Frames = background(attributes.background)[None] * (1 - cover) + colour * cover
    return frames


class World:
    """A shape whose attributes may change from call to call while its position goes on."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._radius = float(rng.uniform(0.25, 0.28)) * SIDE
        self._position: NDArray[np.float64] = rng.uniform(self._radius, SIDE - self._radius, 2)
        self._velocity: NDArray[np.float64] = np.zeros(2)
        self._motion = ""

    def frames(self, attributes: Attributes, count: int) -> Frames:
        """The next `count` frames: float32 [count, 64, 64, 3] in 0..255."""
        low, high = self._radius, SIDE - self._radius
        bouncing = attributes.motion == "bouncing"
        if attributes.motion != self._motion:
            self._motion = attributes.motion
            self._velocity = SPEED * np.array(VELOCITIES[attributes.motion])
            if bouncing:
                self._velocity = self._velocity * self._rng.choice([-1.0, 1.0], 2)
                self._position = np.clip(self._position, low, high)
        positions = np.empty((count, 2))
        for number in range(count):
            positions[number] = self._position
            moved = self._position + self._velocity
            if bouncing:
                outside = (moved < low) | (moved > high)
                self._velocity = np.where(outside, -self._velocity, self._velocity)
                self._position = np.clip(moved, low, high)
            else:
                self._position = moved % SIDE
        return render(attributes, self._radius, positions)


def clip(rng: np.random.Generator, count: int) -> Frames:
    """A clip of `count` frames; three in ten change their attributes after 1, 5 or 9 frames."""
    world, attributes = World(rng), Attributes.random(rng)
    if count > 1 and rng.random() < 0.3:
        before = min(count - 1, int(rng.choice([1, 5, 9])))
        rest = Attributes.random(rng)
        return np.concatenate([world.frames(attributes, before), world.frames(rest, count - before)])
    return world.frames(attributes, count)


def story(rng: np.random.Generator, chunks: int) -> tuple[Frames, list[Attributes]]:
    """A video of `chunks` chunks, 9 + 12 * (chunks - 1) frames, and the attributes of each chunk.

    Three in four switch once and three in ten once more; half of the switches keep some attributes.
    """
    world, attributes = World(rng), Attributes.random(rng)
    switches = {int(rng.integers(1, chunks)) for chance in (0.75, 0.3) if rng.random() < chance}
    frames, each = [], []
    for number in range(chunks):
        if number in switches:
            new = Attributes.random(rng)
            attributes = attributes.mixed(new, rng) if rng.random() < 0.5 else new
        frames.append(world.frames(attributes, CHUNK_FRAMES if number else FIRST_FRAMES))
        each.append(attributes)
    return np.concatenate(frames), each
