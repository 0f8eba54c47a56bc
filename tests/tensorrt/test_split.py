"""How the attention's tiles are divided among programs."""

from __future__ import annotations

import pytest

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.plugins.kernel import ATTENTION, PLACE, Axis, KernelSpec
from swiftvideo.runtime.plugins.split import MOST_PARTIALS, Phase, Split, workspace

HOPPER = Split(queries=128, keys=128, width=128, merged=32, slots=132)
AXES = (Axis(("programs",)), Axis(()), Axis(()))


def spec(op: str, tile: tuple[int, ...]) -> KernelSpec:
    return KernelSpec(op, "entry", 90, "bf16", 128, 8, 0, (), 2, AXES, "0" * 64, tile=tile)


def test_the_unfilled_round_of_the_large_model_is_split() -> None:
    """444 tiles on 132 multiprocessors: three rounds, and 48 tiles for which a fourth was needed."""
    assert HOPPER.phases(4680, 12, 1, 18726) == [Phase(396 + 48 * 5, 396, 5, 0), Phase(48 * 4, 396, 5, 1)]


def test_what_fills_the_gpu_or_is_short_stays_whole() -> None:
    assert HOPPER.phases(128 * 132, 1, 1, 18726) == [Phase(132, 132, 1, 0)]
    assert HOPPER.phases(48, 4, 1, 198) == [Phase(4, 4, 1, 0)]
    assert HOPPER.phases(128 * 131, 1, 1, 18726) == [Phase(131, 131, 1, 0)], "a round that is nearly full"


@pytest.mark.parametrize("slots", [1, 20, 76, 132, 264])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 129, 1560, 4680, 18720])
def test_every_tile_is_computed_and_written_once(slots: int, batch: int, queries: int) -> None:
    split = Split(128, 128, 128, 32, slots)
    first, *merging = split.phases(queries, 12, batch, 18726)
    tiles = -(-queries // 128) * 12 * batch
    if not merging:
        assert first == Phase(tiles, tiles, 1, 0)
        return
    (last,) = merging
    rest = tiles - first.unsplit
    assert first.unsplit % slots == 0 and 0 < rest < slots and first.pieces > 1
    assert first.programs - first.unsplit == rest * first.pieces <= MOST_PARTIALS
    assert last == Phase(rest * 4, first.unsplit, first.pieces, 1)
    assert (first.merging, last.arguments) == (0, (first.unsplit, first.pieces, 1))


def test_the_workspace_has_room_for_all_pieces() -> None:
    assert workspace(spec(ATTENTION, (128, 64, 32, 32))) == MOST_PARTIALS * 128 * 34 * 4


def test_tiles_belong_to_the_attention() -> None:
    with pytest.raises(SettingsError, match=r"DynamicWindowAttention has tile \(128, 128\)"):
        spec(ATTENTION, (128, 128))
    with pytest.raises(SettingsError, match="programs that merge 32 of 16 queries"):
        spec(ATTENTION, (16, 64, 128, 32))
    with pytest.raises(SettingsError, match="PlaceRows has tile"):
        spec(PLACE, (1, 1, 1, 1))
