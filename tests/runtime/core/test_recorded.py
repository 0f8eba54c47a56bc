"""Key counts and pointers of the recorded runs (tests/golden/data), forward by forward."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.core.mirror import Mirror

FOLDER = Path(os.environ.get("SWIFTVIDEO_GOLDEN", Path(__file__).parents[2] / "golden" / "data"))
SCENARIOS = sorted(path for path in FOLDER.glob("scn_*.npz") if not path.stem.endswith("_caches"))


def test_scenarios_are_there() -> None:
    assert SCENARIOS, f"no scn_*.npz in {FOLDER}: set SWIFTVIDEO_GOLDEN to a folder that has them"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_recorded_key_counts_and_pointers(path: Path) -> None:
    data = np.load(path)
    config = json.loads(str(data["config_json"]))
    model = config["args"]["model_kwargs"]
    P, W, S = config["frame_tokens"], model["local_attn_size"], model["sink_size"]
    anchors_max = max(
        int(data["chunk_num_anchors"].max()), config["args"].get("segment_anchor_max_segments", 4)
    )
    mirror = Mirror(P, W, S, anchors_max)
    cache = mirror.cache

    def forward(index: int, window: int, commit: bool) -> None:
        frames, force = int(data["fwd_frames"][index]), bool(data["fwd_sink_recache"][index])
        keys = mirror.forward(int(data["fwd_current_start"][index]) // P, frames, window, force, commit)
        assert keys is not None
        assert len(keys) == data["fwd_k_len"][index], f"forward {index}"

    def switch(number: int) -> None:
        """The forwards that the policy made at a switch; the new anchor is appended after them."""
        mode = str(data[f"switch{number}_mode"])
        mirror.set_memory("bridge" in mode and f"switch{number}_bridge_k" in data, cache.anchors)
        first = int(data[f"switch{number}_first_forward"])
        for index in range(first, first + int(data[f"switch{number}_num_forwards"])):
            forward(index, W, commit=True)
        assert cache.local_end == data[f"switch{number}_local_end"]
        assert cache.global_end == data[f"switch{number}_global_end"]

    switches = {
        int(data[f"switch{i}_start_frame"]): i for i in range(100) if f"switch{i}_start_frame" in data
    }
    checked = 0
    for chunk, start in enumerate(data["chunk_start_frame"].tolist()):
        if start in switches:
            switch(switches.pop(start))
        mirror.set_memory(bool(data["chunk_has_bridge"][chunk]), int(data["chunk_num_anchors"][chunk]))
        assert cache.local_end == data["chunk_local_end_before"][chunk]
        assert cache.global_end == data["chunk_global_end_before"][chunk]
        first, window = int(data["chunk_first_forward"][chunk]), int(data["chunk_window_frames"][chunk])
        for index in range(first, first + 5):
            forward(index, window, commit=index == first + 4)
            checked += 1
        assert cache.local_end == data["chunk_local_end_after"][chunk]
        assert cache.global_end == data["chunk_global_end_after"][chunk]
        mirror.check()
    assert not switches and checked == 5 * len(data["chunk_start_frame"])
