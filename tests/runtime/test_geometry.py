from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from swiftvideo.runtime import (
    AnchorSettings,
    BridgeSettings,
    Geometry,
    PolicySettings,
    SettingsError,
    WindowSettings,
)

SMALL = Geometry(2, 3, 12, 16, 6, 10, 16, 32)


# -- shapes ------------------------------------------------------------------------------------------------------


def test_the_shapes_that_follow_from_a_geometry() -> None:
    g = Geometry(30, 12, 128, 16, 60, 104, 512, 4096)  # Wan 2.1 1.3B at 832x480 (docs/algorithm.md)
    assert (g.dim, g.frame_tokens, g.width, g.height, g.fps) == (1536, 1560, 832, 480, 16)
    assert (g.window, g.sink, g.chunk, g.steps, g.max_anchors) == (12, 3, 3, 4, 4)
    assert (g.memory_rows, g.rows) == (2 + 4, 2 + 4 + 12 * 1560)
    assert g.time_pairs == 64 - 2 * 21
    assert [g.video_frames(start, frames) for start, frames in ((0, 0), (0, 1), (0, 3), (3, 3))] == [
        0,
        1,
        9,
        12,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: 0}, f"{name} is 0: it must be at least 1")
            for name in (
                *("layers", "heads", "head_dim", "latent_channels", "text_len", "text_dim"),
                *("temporal_stride", "spatial_stride", "fps", "steps"),
            )
        ),
        ({"head_dim": 7}, "head_dim is 7: rotary embeddings need an even width"),
        ({"patch": (2, 2, 2)}, r"patch is \(2, 2, 2\): it must be \(1, h, w\)"),
        ({"patch": (1, 0, 2)}, r"patch is \(1, 0, 2\)"),
        ({"latent_height": 7}, "latent_height is 7: it must be a positive multiple of the patch, 2"),
        ({"latent_width": 0}, "latent_width is 0: it must be a positive multiple of the patch, 2"),
        ({"latent_width": 9, "patch": (1, 2, 4)}, "latent_width is 9: .* the patch, 4"),
        ({"sink": 4}, "sink is 4 and chunk is 3: a sink larger than a chunk"),
        ({"sink": -1}, "window 12, sink -1, chunk 3 and max_anchors 4: need"),
        ({"max_anchors": -1}, "max_anchors -1: need"),
        ({"chunk": 0, "sink": 0}, "chunk 0 and max_anchors 4: need"),
        ({"window": 5}, "window 5, sink 3, chunk 3 .*window >= sink \\+ chunk"),
    ],
)
def test_shapes_that_make_no_model_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(SMALL, **change)


def test_the_smallest_shapes_are_taken() -> None:
    tiny = Geometry(1, 1, 2, 1, 1, 1, 1, 1, (1, 1, 1), 1, 0, 1, 0, 1, 1, 1, 1)
    assert (tiny.rows, tiny.dim, tiny.time_pairs) == (3, 2, 1)
    assert dataclasses.replace(SMALL, window=6).window == 6


# -- settings ----------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_published_configurations() -> None:
    """docs/algorithm.md, section 9; positions are this project's own."""
    assert PolicySettings() == PolicySettings(
        policy="swift",
        positions="windowed",
        global_sink=True,
        bridge=BridgeSettings(True, recent=2, micro=None, tau_low=0.7, tau_high=0.8, scale=1.0, decay=0.85),
        window=WindowSettings(True, min_size=7, tau_post=18.0, tau_pre=9.0),
        anchors=AnchorSettings(True, recent=6, max=4, mix=0.35, scale=0.8),
    )


def test_the_ends_of_every_range_are_taken() -> None:
    BridgeSettings(recent=1, micro=1, tau_low=0.0, tau_high=0.0, scale=999_999.0, decay=0.0)
    BridgeSettings(decay=1.0)
    WindowSettings(min_size=1, tau_post=0.0, tau_pre=0.0)
    AnchorSettings(recent=1, max=0, mix=0.0)
    AnchorSettings(mix=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BridgeSettings(recent=0), "bridge.recent is 0"),
        (lambda: BridgeSettings(micro=0), "bridge.micro is 0"),
        (lambda: BridgeSettings(tau_low=0.9), "tau_low 0.9, tau_high 0.8: need"),
        (lambda: BridgeSettings(tau_low=float("nan")), "tau_low nan"),
        (lambda: BridgeSettings(scale=0), "bridge.scale is 0: it must be positive"),
        (lambda: BridgeSettings(scale=float("inf")), "bridge.scale is inf"),
        (
            lambda: BridgeSettings(scale=1e39),
            "bridge.scale is 1e\\+39: it must be positive and below a million",
        ),
        (lambda: BridgeSettings(scale=1e6), "bridge.scale is 1000000.0: it must be positive and below"),
        (lambda: BridgeSettings(decay=1.1), r"bridge.decay is 1.1: it must be in \[0, 1\]"),
        (lambda: BridgeSettings(decay=-0.1), "bridge.decay is -0.1"),
        (lambda: BridgeSettings(tau_low=-0.1), "tau_low -0.1"),
        (lambda: WindowSettings(min_size=0), "window.min_size is 0"),
        (lambda: WindowSettings(tau_post=-1), "window.tau_post is -1"),
        (lambda: WindowSettings(tau_pre=-1), "window.tau_pre is -1"),
        (lambda: AnchorSettings(recent=0), "anchors.recent is 0"),
        (lambda: AnchorSettings(max=-1), "anchors.max is -1"),
        (lambda: AnchorSettings(mix=1.5), "anchors.mix is 1.5"),
        (lambda: AnchorSettings(mix=-0.5), "anchors.mix is -0.5"),
        (lambda: AnchorSettings(scale=0.0), "anchors.scale is 0.0: it must be positive"),
        (lambda: AnchorSettings(scale=-1), "anchors.scale is -1"),
        (
            lambda: AnchorSettings(scale=1e38),
            "anchors.scale is 1e\\+38: it must be positive and below a million",
        ),
        (lambda: BridgeSettings(recent=1.5), "bridge.recent is 1.5: use a whole number"),  # type: ignore[arg-type]
        (lambda: BridgeSettings(enabled=1), "bridge.enabled is 1: use True or False"),  # type: ignore[arg-type]
        (lambda: AnchorSettings(mix="x"), "anchors.mix is 'x': use a number"),  # type: ignore[arg-type]
        (lambda: WindowSettings(min_size=True), "window.min_size is True: use a whole number"),
        (lambda: PolicySettings(bridge={}), "bridge is {}: use BridgeSettings"),  # type: ignore[arg-type]
        (lambda: PolicySettings(window={}), "window is {}: use WindowSettings"),  # type: ignore[arg-type]
        (lambda: PolicySettings(anchors={}), "anchors is {}: use AnchorSettings"),  # type: ignore[arg-type]
        (lambda: PolicySettings(global_sink=1), "global_sink is 1: use True or False"),  # type: ignore[arg-type]
        (lambda: PolicySettings(policy="x"), "policy is 'x': use"),  # type: ignore[arg-type]
        (lambda: PolicySettings(positions="x"), "positions is 'x': use"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()
