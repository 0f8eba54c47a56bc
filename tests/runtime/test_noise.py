from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from swiftvideo.runtime import Pipeline, PolicySettings, SettingsError
from swiftvideo.runtime.noise import PhiloxNoise, philox
from tests.runtime.watch import Run

MASK = (1 << 64) - 1


def words(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as its paper defines it (Salmon et al., 2011): four words of one counter."""
    k, c = list(key), list(counter)
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def normals(seed: int, item: int, step: int, chunk: int, count: int) -> Any:
    """numpy's float32 normals over its Philox, once its words are those that `words` computes."""

    def stream() -> np.random.Philox:
        key = np.array([seed, item], np.uint64)
        return np.random.Philox(key=key, counter=np.array([0, 0, step, chunk], np.uint64))

    blocks = range(1, count + 1)  # numpy counts up before it draws
    expected = [word for block in blocks for word in words((seed, item), (block, 0, step, chunk))]
    assert stream().random_raw(4 * count).tolist() == expected
    return np.random.Generator(stream()).standard_normal(count, dtype=np.float32)


@pytest.mark.parametrize(
    ("seed", "item", "step", "chunk"), [(7, 0, 0, 0), (0, 1, 3, 5), (2**64 - 1, 0, 2, 2**40), (3, 2, 1, 9)]
)
def test_noise_is_philox_keyed_by_seed_and_counted_by_chunk_and_step(
    seed: int, item: int, step: int, chunk: int
) -> None:
    made = philox(seed, chunk, step, (item + 1, 2, 3))
    assert made.dtype == np.float32 and made.shape == (item + 1, 2, 3)
    np.testing.assert_array_equal(made[item].ravel(), normals(seed, item, step, chunk, 6))


def test_noise_stays_the_same_for_ever() -> None:
    recorded = [-0.512068331, 2.6331296, -0.973831058, 1.56152487, 1.38307226, -0.614506543]
    np.testing.assert_array_equal(philox(7, 11, 2, (1, 6))[0], np.array(recorded, np.float32))


def test_every_draw_differs_and_none_depends_on_the_ones_before() -> None:
    source = PhiloxNoise(9, (2, 3, 4))
    draws = {(chunk, step): source.draw(chunk, step) for chunk in range(3) for step in range(4)}
    flat = [item.tobytes() for draw in draws.values() for item in draw]
    assert len(set(flat)) == len(flat)
    np.testing.assert_array_equal(PhiloxNoise(9, (2, 3, 4)).draw(2, 3), draws[2, 3])
    np.testing.assert_array_equal(PhiloxNoise(9, (1, 3, 4)).draw(2, 3)[0], draws[2, 3][0])
    assert not np.array_equal(PhiloxNoise(10, (2, 3, 4)).draw(2, 3), draws[2, 3])


def test_noise_is_standard_normal() -> None:
    sample = np.sort(philox(1, 2, 3, (2, 50_000)).ravel().astype(np.float64))
    expected = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in sample])
    assert np.abs(expected - np.arange(len(sample)) / len(sample)).max() < 0.008
    assert abs(np.corrcoef(philox(1, 2, 3, (1, 50_000)), philox(1, 2, 2, (1, 50_000)))[0, 1]) < 0.02


def test_a_rollout_draws_the_start_and_after_every_step_but_the_last(
    pipeline: Pipeline, texts: tuple[str, ...]
) -> None:
    run = Run(pipeline.engine, pipeline.encode(texts[0]), PolicySettings())
    run.chunks(2)
    g = pipeline.geometry
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    for chunk in range(2):
        np.testing.assert_array_equal(run.tensors.named("load")[chunk][0], philox(5, chunk, 0, shape))
        forwards = run.tensors.named("denoise")[chunk * (g.steps + 1) : (chunk + 1) * (g.steps + 1)]
        assert [arguments[0] for arguments in forwards] == list(range(g.steps + 1))
        for step, (_, noise, *_rest) in enumerate(forwards):
            if step + 1 < g.steps:
                np.testing.assert_array_equal(noise, philox(5, chunk, step + 1, shape))
            else:
                assert noise is None


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_a_seed_that_is_none_is_refused(pipeline: Pipeline, texts: tuple[str, ...], seed: Any) -> None:
    with pytest.raises(SettingsError, match=r"seed is .*(2\^64 - 1|whole number)"):
        pipeline.session(texts[0], seed)


def test_any_integer_type_is_a_seed(pipeline: Pipeline, texts: tuple[str, ...]) -> None:
    with pipeline.session(texts[0], np.uint64(2**64 - 1)) as session:  # type: ignore[arg-type]
        assert session.seed == 2**64 - 1 and type(session.seed) is int
