"""A recorded run, done again by `swiftvideo.runtime.rollout` on any engine, with a trace of what it decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.engine import Engine
from swiftvideo.runtime.memory import Forward, Switch
from swiftvideo.runtime.rollout import Rollout

from .scenario import Scenario

Array = NDArray[Any]


@dataclass
class ChunkTrace:
    """A chunk as the recording describes it."""

    start_frame: int
    segment_start_frame: int = -1
    next_switch: int = -1
    window_frames: int = -1
    first_forward: int = -1
    has_bridge: bool = False
    bridge_scale: float = 0.0
    num_anchors: int = -1
    local_end_before: int = -1
    global_end_before: int = -1
    has_bridge_after: bool = False
    bridge_scale_after: float = 0.0
    local_end_after: int = -1
    global_end_after: int = -1


@dataclass
class SwitchTrace:
    """A switch as the recording describes it."""

    switch: Switch
    old_signature: Array
    new_signature: Array
    bridge: Array | None
    bridge_scale: float
    anchors: Array | None
    anchor_scale: float
    local_end: int
    global_end: int
    num_forwards: int
    first_forward: int


@dataclass
class Trace:
    """A whole run."""

    latents: Array
    chunks: list[ChunkTrace] = field(default_factory=list)
    switches: list[SwitchTrace] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    caches: dict[str, Array] = field(default_factory=dict)


def replay(scenario: Scenario, engine: Engine, with_caches: bool = False) -> Trace:
    """Run a scenario to its end."""
    data = scenario.data
    frames = data["noise"].shape[1]
    trace = Trace(np.empty((scenario.batch, 0, *data["noise"].shape[2:]), np.float32))
    before: list[ChunkTrace] = []
    policy: list[dict[str, Any]] = []

    def observe(forward: Forward) -> None:
        """Note the memory as it is when a chunk's first forward runs, that is, right after a switch."""
        trace.forwards.append(forward)
        if forward.step != 0:
            return
        memory = rollout.memory
        cache = memory.cache
        if due and with_caches:
            trace.caches |= slots(rollout, f"switch{len(trace.switches)}_cache_{{}}_after")
        before.append(
            ChunkTrace(
                start_frame=forward.start,
                first_forward=len(trace.forwards) - 1,
                has_bridge=memory.bridge is not None,
                bridge_scale=float(memory.bridge_scale),
                num_anchors=len(memory.anchors),
                local_end_before=cache.local_end,
                global_end_before=cache.global_end,
            )
        )
        policy.append(
            {
                "bridge": memory.bridge,
                "bridge_scale": float(memory.bridge_scale),
                "anchors": np.concatenate(memory.anchors, 2) if memory.anchors else None,
                "anchor_scale": float(np.float32(scenario.settings.anchors.scale)),
                "local_end": cache.local_end,
                "global_end": cache.global_end,
            }
        )

    prompts = [engine.condition(scenario.embeds(s)) for s in range(len(data["prompt_ids"]))]
    due = False
    rollout = Rollout(engine, scenario.settings, prompts[0], scenario, scenario.batch, observe)
    for prompt, frame in zip(prompts[1:], scenario.switch_frames, strict=True):
        rollout.ask(prompt, frame)
    while rollout.frame < frames:
        old, made = rollout.prompt, len(trace.forwards)
        due = bool(rollout.pending) and rollout.pending[0].frame <= rollout.frame
        if due and with_caches:
            trace.caches |= slots(rollout, f"switch{len(trace.switches)}_cache_{{}}_before")
        step = rollout.advance()
        trace.latents = np.concatenate((trace.latents, step.latents), 1)
        chunk, memory = before[-1], rollout.memory
        chunk.segment_start_frame, chunk.window_frames = step.segment, step.window
        chunk.next_switch = -1 if step.upcoming is None else step.upcoming
        chunk.has_bridge_after = memory.bridge is not None
        chunk.bridge_scale_after = float(memory.bridge_scale)
        chunk.local_end_after, chunk.global_end_after = memory.cache.local_end, memory.cache.global_end
        trace.chunks.append(chunk)
        assert (step.switch is not None) == due
        if step.switch is not None:
            trace.switches.append(
                SwitchTrace(
                    switch=step.switch,
                    old_signature=old.signature,
                    new_signature=step.prompt.signature,
                    num_forwards=chunk.first_forward - made,
                    first_forward=made,
                    **policy[-1],
                )
            )
        memory.cache.check_integrity()
    rollout.close()
    return trace


def slots(rollout: Rollout, name: str) -> dict[str, Array]:
    """K and V in the order of time, as the recordings keep them: [L,B,L_end,n,d]."""
    g, cache = rollout.geometry, rollout.memory.cache
    state = rollout.tensors.export_state()
    tokens = g.frame_tokens
    sink, ring = g.sink * tokens, (g.window - g.sink) * tokens
    first = cache.global_end - (cache.local_end - min(sink, cache.local_end))
    recent = g.memory_rows + sink + (np.arange(first, cache.global_end) - cache.base - sink) % ring
    rows = np.concatenate((g.memory_rows + np.arange(min(sink, cache.local_end)), recent)).astype(np.int64)
    return {name.format(kind): state[f"cache_{kind}"][:, :, rows] for kind in ("k", "v")}
