"""The SWIFT policy (algorithm.md, sections 4 to 9): what a session remembers, and what a prompt switch does to it.

Which rows are keys is decided by the C core (`_core.Cache`), numbers are computed by an engine. This module decides
when: window, strength of a switch, mode, anchors, decay of the bridge, and where the sink stands in time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._core import Cache
from .engine import EngineSession, Float32, Prompt
from .errors import SettingsError, UsageError
from .geometry import Geometry, Mode, PolicySettings, WindowSettings
from .positions import rotation, time_tables
from .telemetry import Stopwatch

SMALLEST_BRIDGE = 1e-3
"""A bridge whose scale fell below this is dropped."""


def window_frames(
    settings: WindowSettings, geometry: Geometry, current: int, segment: int, upcoming: int | None
) -> int:
    """Frames that the chunk at `current` looks back over, sink and itself included (algorithm.md, section 7).

    segment: the frame at which the running prompt took over; upcoming: that of the next switch, if known.
    """
    whole = geometry.window
    if not settings.enabled:
        return whole
    smallest = max(3, whole // 2) if settings.min_size is None else settings.min_size
    lowest = max(geometry.sink + 1, min(smallest, whole))
    tau_post = whole if settings.tau_post is None else settings.tau_post
    tau_pre = 2.0 * geometry.chunk if settings.tau_pre is None else settings.tau_pre
    weight = _fading(current - segment, tau_post)
    if upcoming is not None:
        weight = max(weight, _fading(upcoming - current, tau_pre))
    return round(lowest + (whole - lowest) * weight)  # weight is in [0, 1]


def _fading(frames: int, tau: float) -> float:
    """exp(-frames / tau), at most 1; tau 0 fades at once."""
    if frames <= 0:
        return 1.0
    return math.exp(-frames / tau) if tau else 0.0


def switch_strength(old: Float32, new: Float32) -> NDArray[np.float64]:
    """rho, float64 [B], of signatures [B,D]: clamp(1 - cosine, 0, 1) (algorithm.md, section 4)."""
    a, b = old.astype(np.float64), new.astype(np.float64)
    norms = np.maximum(np.linalg.norm(a, axis=1), 1e-6) * np.maximum(np.linalg.norm(b, axis=1), 1e-6)
    rho: NDArray[np.float64] = np.clip(1.0 - (a * b).sum(1) / norms, 0.0, 1.0)
    return rho


@dataclass(frozen=True, slots=True, eq=False)
class Switch:
    """What happened when a prompt took over."""

    frame: int
    """Latent frame of the chunk boundary."""
    mode: Mode
    rho: Float32
    """[B], measured, whether or not the policy uses it."""
    strength: float
    """What decided: the batch's largest rho, 1.0 without a bridge."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One run of the backbone, as an observer sees it. `step` is geometry.steps for context passes and recaches."""

    start: int
    frames: int
    step: int
    keys: int
    force_sink: bool


class Memory:
    """Memory of one session: the C core's rows, the bridge, the anchors and the place of the sink.

    observer: called after every run of the backbone; for tests and tools.
    """

    def __init__(
        self,
        engine: EngineSession,
        geometry: Geometry,
        settings: PolicySettings,
        observer: Callable[[Forward], None] | None = None,
    ) -> None:
        if settings.anchors.max > geometry.max_anchors:
            raise SettingsError(
                f"anchors.max is {settings.anchors.max} and the model keeps {geometry.max_anchors} anchor rows: "
                "lower anchors.max"
            )
        self.geometry = geometry
        self.settings = settings
        self.cache = Cache(geometry.frame_tokens, geometry.window, geometry.sink, geometry.max_anchors)
        self.bridge: Float32 | None = None
        """Unscaled, [L,B,2,n,d], order sink, recent."""
        self.bridge_scale = np.float32(0)
        self.anchors: list[Float32] = []
        """Unscaled, [L,B,1,n,d] each, oldest first."""
        self.clock = Stopwatch()
        swift = settings.policy == "swift"
        self._bridges = swift and settings.bridge.enabled
        self._anchors = swift and settings.anchors.enabled and settings.anchors.max > 0
        self._engine = engine
        self._observer = observer
        self._origin = 0  # frame of slot 0
        self._sink_frame = 0  # frame whose K the sink's first row holds, before placing
        self._sink_offset = 0  # frames by which the sink was placed later
        self._memory_offset = 0
        self._segments = np.zeros((6, 2), np.int32)
        self._ranges = np.zeros((4, 3), np.int32)
        self._spans = np.zeros((5, 3, 2), np.int32)

    # -- the chunk -----------------------------------------------------------------------------------------------

    def window(self, current: int, segment: int, upcoming: int | None) -> int:
        """`window_frames` under these settings; policies other than "swift" always use the whole window."""
        if self.settings.policy != "swift":
            return self.geometry.window
        return window_frames(self.settings.window, self.geometry, current, segment, upcoming)

    def begin(self, start: int, frames: int, window: int, force_sink: bool = False) -> int:
        """Choose the keys of the forwards over frames [start, start + frames); return their number."""
        self._place(start + frames - 1)
        self._time = time_tables(start, frames, self.geometry.time_pairs)
        self._call = (start, frames, force_sink)
        self._keys = self.cache.plan(start, frames, window, force_sink, self._segments.data)
        return self._keys

    def forward(self, step: int, noise: Float32 | None, prompt: Prompt) -> None:
        """Run the engine on its loaded latents, over the keys of `begin`."""
        self._engine.denoise(step, noise, *self._time, self._segments, prompt)
        if self._observer is not None:
            start, frames, force_sink = self._call
            self._observer(Forward(start, frames, step, self._keys, force_sink))

    def commit(self) -> None:
        """Keep K and V of the last forward."""
        start, frames, force_sink = self._call
        count = self.cache.commit(start, frames, force_sink, self._ranges.data)
        ranges = self._ranges[:count]
        self._engine.commit(ranges)
        for fresh, row, _ in ranges.tolist():
            if row == self.geometry.memory_rows:  # the sink's first, where there is a sink
                self._sink_frame, self._sink_offset = start + fresh // self.geometry.frame_tokens, 0

    def end_chunk(self) -> None:
        """Let the bridge fade (algorithm.md, 8.5)."""
        if self.bridge is not None:
            self.bridge_scale *= np.float32(self.settings.bridge.decay)
            if self.bridge_scale < SMALLEST_BRIDGE:
                self._drop_bridge()
            else:
                self._write_bridge()
            self._show()

    # -- the switch ----------------------------------------------------------------------------------------------

    def switch(self, current: int, old: Prompt, new: Prompt, emitted: Float32) -> Switch:
        """Let `new` take over at frame `current` (algorithm.md, 8.1).

        emitted: clean latents [B,k,C,h,w] of the last k = min(W, frames so far) frames.
        """
        policy = self.settings.policy
        exact = switch_strength(old.signature, new.signature)
        rho = exact.astype(np.float32)
        if policy == "keep":
            return Switch(current, "keep", rho, 1.0)
        if policy == "cut":
            self._clear(current)
            return Switch(current, "cut", rho, 1.0)
        strength = float(exact.max()) if self._bridges else 1.0
        bridge_settings = self.settings.bridge
        full = not self._bridges or strength >= bridge_settings.tau_high
        bridge, anchor = self._inject(old, new, rho, bridge=not full)
        if full:
            self._drop_bridge()
            self._show()
            self._recache(current, self.geometry.window, new, emitted, not self.settings.global_sink)
            mode: Mode = "full-recache"
        else:
            if bridge is not None:
                self.bridge, self.bridge_scale = bridge, np.float32(bridge_settings.scale)
                self._write_bridge()
            self._show()
            mode = "bridge-only"
            if strength >= bridge_settings.tau_low:
                frames = self.geometry.chunk if bridge_settings.micro is None else bridge_settings.micro
                self._recache(current, frames, new, emitted, False)
                mode = "bridge+micro-recache"
        if anchor is not None:
            self.anchors = [*self.anchors, anchor][-self.settings.anchors.max :]
            self._write_anchors()
            self._show()
        return Switch(current, mode, rho, strength)

    def _inject(
        self, old: Prompt, new: Prompt, rho: Float32, bridge: bool
    ) -> tuple[Float32 | None, Float32 | None]:
        """Bridge and anchor, unscaled; None where the cache is empty or neither is wanted."""
        if not (bridge or self._anchors) or self.cache.local_end == 0:
            return None, None
        anchors, chunk = self.settings.anchors, self.geometry.chunk
        recent = chunk if anchors.recent is None else anchors.recent
        self.cache.spans(self.settings.bridge.recent, recent, self._spans.data)
        with self.clock.stage("inject"):
            made = self._engine.inject(self._spans, old.signature, new.signature, rho, anchors.mix)
        return made[0], made[1] if self._anchors else None

    def _recache(self, current: int, frames: int, prompt: Prompt, emitted: Float32, force_sink: bool) -> None:
        """Run the last frames again under `prompt` and keep their K and V; every frame sees all of them."""
        frames = min(frames, self.geometry.window, current - self._origin)
        if frames == 0:
            return
        with self.clock.stage("recache"):
            self.begin(current - frames, frames, self.geometry.window, force_sink)
            self._engine.load(np.ascontiguousarray(emitted[:, emitted.shape[1] - frames :]))
            self.forward(self.geometry.steps, None, prompt)
            self.commit()

    # -- the rows before the sink --------------------------------------------------------------------------------

    def _write_bridge(self) -> None:
        assert self.bridge is not None
        self._write(0, self.bridge * self.bridge_scale)

    def _write_anchors(self) -> None:
        self._write(2, np.concatenate(self.anchors, 2) * np.float32(self.settings.anchors.scale))

    def _write(self, row: int, tokens: Float32) -> None:
        self._engine.write_memory(row, tokens)
        self._memory_offset = 0

    def _drop_bridge(self) -> None:
        self.bridge, self.bridge_scale = None, np.float32(0)

    def _show(self) -> None:
        self.cache.set_memory(self.bridge is not None, len(self.anchors))

    def _clear(self, current: int) -> None:
        self._drop_bridge()
        self.anchors = []
        self.cache.clear(current)
        self._origin = self._sink_frame = current
        self._sink_offset = self._memory_offset = 0

    def _place(self, newest: int) -> None:
        """Positions "windowed": keep the sink and the memory rows within W - 1 frames of frame `newest`.

        Unplaced memory rows carry no rotation: they stand at frame 0. Nothing is placed before the frame at which the
        cache began, so a cache that began at frame 10 million sees the distances that one from frame 0 sees.
        """
        if self.settings.positions != "windowed":
            return
        oldest = max(self._origin, newest - (self.geometry.window - 1))
        offset = oldest - self._sink_frame  # a sink is never younger than the window's oldest frame
        if offset != self._sink_offset and self.geometry.sink:
            self._engine.place_sink(*rotation(offset, self.geometry.time_pairs))
            self._sink_offset = offset
        if oldest != self._memory_offset and (self.bridge is not None or self.anchors):
            self._engine.place_memory(*rotation(oldest, self.geometry.time_pairs))
            self._memory_offset = oldest

    # -- snapshots -----------------------------------------------------------------------------------------------

    def export_state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Plain values and arrays that `import_state` takes; the engine's arrays are its own matter."""
        plain = {
            "cache": list(self.cache.state()),
            "bridge_scale": float(self.bridge_scale),
            "places": [self._origin, self._sink_frame, self._sink_offset, self._memory_offset],
        }
        arrays = {f"anchor.{index}": anchor for index, anchor in enumerate(self.anchors)}
        if self.bridge is not None:
            arrays["bridge"] = self.bridge
        return plain, arrays

    def import_state(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]], batch: int) -> None:
        """Continue from an `export_state`. Raises UsageError or IntegrityError where it does not fit."""
        self.cache.restore(tuple(plain["cache"]))
        self.bridge = arrays.get("bridge")
        scale = float(plain["bridge_scale"])
        self.anchors = [arrays[f"anchor.{index}"] for index in range(self.cache.anchors)]
        if (self.bridge is not None) != self.cache.has_bridge:
            raise UsageError("the saved bridge and the saved cache contradict each other: save it again")
        g = self.geometry
        for tokens, count in ((self.bridge, 2), *((anchor, 1) for anchor in self.anchors)):
            if tokens is None:
                continue
            shape = (g.layers, batch, count, g.heads, g.head_dim)
            if tokens.shape != shape or tokens.dtype != np.float32:
                raise UsageError(
                    f"saved memory tokens are {tokens.dtype} {tokens.shape}, not float32 {shape}: "
                    "they are not this model's"
                )
            if not np.isfinite(tokens).all():
                raise UsageError("saved memory tokens are not finite: the file is damaged")
        places = [operator.index(place) for place in plain["places"]]
        origin, sink_frame, *offsets = places
        end = self.cache.global_end // g.frame_tokens
        if (
            len(offsets) != 2
            or min(places) < 0
            or max(places) > end
            or origin * g.frame_tokens != self.cache.base
            or not 0 <= scale <= float(np.float32(self.settings.bridge.scale))
        ):
            raise UsageError(f"places {places} or bridge_scale {scale} of the saved memory are impossible")
        self.bridge_scale = np.float32(scale)
        self._origin, self._sink_frame = origin, sink_frame
        self._sink_offset, self._memory_offset = offsets
        self.cache.check_integrity()
