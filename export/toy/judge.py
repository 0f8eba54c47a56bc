"""Says what a chunk of frames shows, from pixel statistics alone; nothing here is learned.

The backgrounds are neutral and the shapes saturated, so a pixel's chroma separates them. Position is
measured on the circle (a mean angle), because most motions leave at one side and enter at the other.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from . import prompts, scenes
from .prompts import Attributes

SIDE = scenes.SIDE
_MOVING = 0.4
"""Pixels a frame from which an axis counts as moving; the slowest drawn one has 1.0 (bouncing, vertical)."""
_CHROMA = 36.0
_Array = NDArray[np.float64]


def judge(frames: NDArray[np.uint8]) -> Attributes:
    """The attributes of one chunk, '' where not recognised. `frames`: uint8 [n, 64, 64, 3], n >= 2."""
    pixels = frames.astype(np.float64)
    masks = segment(pixels)
    counts = masks.sum((1, 2))
    where = _background(pixels, masks)
    if np.median(counts) < 60:  # the smallest drawn shape has more than 400 pixels
        return Attributes("", "", "", where)
    return Attributes(_colour(pixels, masks), _shape(masks), _motion(masks), where)


def segment(pixels: _Array) -> NDArray[np.bool_]:
    """Pixels of the shape, bool [n, 64, 64]: those whose channels differ by more than a neutral's do."""
    chroma = pixels.max(-1) - pixels.min(-1)
    peak = np.percentile(chroma, 97, axis=(1, 2))[:, None, None]
    result: NDArray[np.bool_] = chroma > np.maximum(_CHROMA, 0.5 * peak)
    return result


def _colour(pixels: _Array, masks: NDArray[np.bool_]) -> str:
    shown = np.median(pixels[masks], axis=0)
    names = prompts.COLOURS
    table = np.array([scenes.COLOURS[name] for name in names], np.float64)
    return names[int(((table - shown) ** 2).sum(-1).argmin())]


def _background(pixels: _Array, masks: NDArray[np.bool_]) -> str:
    """The drawn background nearest to the median over rows of what is not the shape."""
    clean = np.where(masks[..., None], np.nan, pixels).transpose(1, 0, 2, 3).reshape(SIDE, -1, 3)
    visible = ~np.isnan(clean[..., 0]).all(1)
    if not visible.any():
        return ""
    rows = np.nanmedian(clean[visible], axis=1)
    errors = {
        name: float(((scenes.background(name)[visible, 0].astype(np.float64) - rows) ** 2).mean())
        for name in prompts.BACKGROUNDS
    }
    name, error = min(errors.items(), key=lambda item: item[1])
    return name if error < 45.0**2 else ""


def centres(masks: NDArray[np.bool_]) -> _Array:
    """Circular mean position of each mask, float64 [n, 2] as (x, y) in pixels."""
    angle = np.exp(2j * np.pi * (np.arange(SIDE) + 0.5) / SIDE)
    x, y = masks.sum(1) @ angle, masks.sum(2) @ angle
    positions: _Array = np.stack([np.angle(x), np.angle(y)], -1) / (2 * np.pi) * SIDE % SIDE
    return positions


def _motion(masks: NDArray[np.bool_]) -> str:
    steps = np.diff(centres(masks), axis=0)
    steps = (steps + SIDE / 2) % SIDE - SIDE / 2
    x, y = (float(value) for value in np.median(steps, axis=0))
    ax, ay = (float(value) for value in np.median(np.abs(steps), axis=0))
    if ax > _MOVING and ay > _MOVING:  # both axes: absolute values, a reflection inside the chunk may happen
        return "bouncing"
    if max(ax, ay) <= _MOVING:
        return "still"
    if ax > ay:
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


@functools.cache
def _templates() -> dict[str, list[tuple[float, NDArray[np.complex128]]]]:
    """Per shape, for radii over the drawn range: its area in pixels and the spectrum of its mask."""
    offset = (np.arange(SIDE, dtype=np.float32) + 0.5) - SIDE / 2
    dx, dy = np.broadcast_arrays(offset[None, :], offset[:, None])
    result: dict[str, list[tuple[float, NDArray[np.complex128]]]] = {}
    for name in prompts.SHAPES:
        masks = [scenes.signed_distance(name, radius, dx, dy) < 0 for radius in np.linspace(14.7, 19.2, 8)]
        result[name] = [(float(mask.sum()), np.conj(np.fft.rfft2(mask))) for mask in masks]
    return result


def _shape(masks: NDArray[np.bool_]) -> str:
    """The template with the largest intersection over union at its best alignment, mean over frames."""
    scores = {}
    chosen = masks[:: max(1, len(masks) // 4)].astype(np.float64)
    spectrum = np.fft.rfft2(chosen)
    area = chosen.sum((1, 2))
    for name, templates in _templates().items():
        best = np.zeros(len(chosen))
        for size, template in templates:
            # Circular cross-correlation: the overlap at every alignment at once, the wrapping ones too.
            overlap = np.fft.irfft2(spectrum * template, s=(SIDE, SIDE)).max((1, 2))
            best = np.maximum(best, overlap / (area + size - overlap))
        scores[name] = float(best.mean())
    name, score = max(scores.items(), key=lambda item: item[1])
    return name if score > 0.6 else ""
