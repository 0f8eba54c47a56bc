"""Random models, settings and prompts: the runtime against the contract's own words (contract.py).

The recordings are of one geometry and one policy, and those kept here of one item; here are the others.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings

from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.torch_engine import TorchEngine
from swiftvideo.runtime.engine import Prompt
from swiftvideo.runtime.geometry import (
    AnchorSettings,
    BridgeSettings,
    Geometry,
    PolicySettings,
    WindowSettings,
)
from swiftvideo.runtime.memory import Forward
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.rollout import Rollout

from .contract import Stream
from .test_scenarios import close

ITEMS = np.array([0.3, 1], np.float32).reshape(2, 1, 1)

counts, taus = st.integers(1, 9), st.sampled_from([None, 0.0, 2.0, 20.0])
policies = st.builds(
    PolicySettings,
    policy=st.sampled_from([*["swift"] * 5, "recache", "keep", "cut"]),
    positions=st.sampled_from(["absolute", "windowed"]),
    global_sink=st.booleans(),
    bridge=st.builds(
        lambda taus, **rest: BridgeSettings(tau_low=min(taus), tau_high=max(taus), **rest),
        taus=st.tuples(*[st.sampled_from([0.0, 0.2, 0.6, 1.0, 2.0])] * 2),
        enabled=st.sampled_from([True, True, True, False]),
        recent=counts,
        micro=st.none() | counts,
        scale=st.sampled_from([1.0, 0.5, 2.0]),
        decay=st.sampled_from([0.85, 0.02, 0.0, 1.0]),
    ),
    window=st.builds(
        WindowSettings, enabled=st.booleans(), min_size=st.none() | counts, tau_post=taus, tau_pre=taus
    ),
    anchors=st.builds(
        AnchorSettings,
        enabled=st.sampled_from([True, True, False]),
        recent=st.none() | counts,
        max=st.integers(0, 3),
        mix=st.sampled_from([0.35, 0.0, 1.0]),
        scale=st.sampled_from([0.8, 1.5]),
    ),
)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[BackboneConfig, Geometry]:
    """Odd grids, single frames, windows without room to spare."""
    chunk = draw(st.integers(1, 3))
    sink = draw(st.integers(0, chunk))
    config = BackboneConfig(
        dim=2 * draw(st.sampled_from([6, 8, 10])),
        ffn_dim=5,
        num_heads=2,
        num_layers=draw(st.integers(1, 3)),
        text_dim=3,
        text_len=4,
        in_channels=2,
        out_channels=2,
        freq_dim=8,
    )
    height, width = (2 * draw(st.integers(1, 3)) for _ in range(2))
    window = sink + chunk + draw(st.integers(0, 3))
    return config, config.geometry(
        height, width, window=window, sink=sink, chunk=chunk, max_anchors=3, steps=2
    )


def model_of(config: BackboneConfig, seed: int) -> CausalWanModel:
    """Random weights, norms' and biases' too."""
    made, random = CausalWanModel(config), torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        noise = torch.randn(weight.shape, generator=random)
        weight.data = 1 + 0.2 * noise if weight.ndim == 1 else noise / weight[0].numel() ** 0.5
    return made.eval().requires_grad_(False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes(),
    policy=policies,
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
    asked=st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from([0.0, 0.3, 0.7, 5.0])), min_size=2, max_size=6
    ),
)
def test_a_video_is_what_the_contract_says(
    shape: tuple[BackboneConfig, Geometry],
    policy: PolicySettings,
    batch: int,
    seed: int,
    asked: list[tuple[int, float]],
) -> None:
    """asked: the frames of prompts, and how far each is from the one before."""
    torch.set_num_threads(1)
    (config, g), schedule, forwards = shape, Schedule(indices=(1000, 400)), list[Forward]()
    model = model_of(config, seed)
    engine = TorchEngine(model, g, schedule)
    noise = PhiloxNoise(seed, (batch, g.chunk, g.latent_channels, g.latent_height, g.latent_width))
    random = np.random.default_rng(seed)

    def draw() -> Any:
        """The second item's prompts differ more from each other."""
        return random.standard_normal((batch, g.text_len, g.text_dim), np.float32) * ITEMS[:batch]

    embeds = draw()
    prompt = engine.condition(embeds)
    ours = Rollout(engine, policy, prompt, noise, batch, forwards.append)
    theirs = Stream(model, g, policy, schedule, prompt)
    pending: list[tuple[int, Prompt]] = []
    for frame, far in sorted(asked, key=lambda item: item[0]):
        embeds = embeds + np.float32(far) * draw()
        pending.append((frame, engine.condition(embeds)))
        ours.ask(pending[-1][1], frame)
    for index in range(8):
        switch = None
        if pending and pending[0][0] <= theirs.current:
            switch = theirs.switch(pending.pop(0)[1])
            exact = abs(switch[1].max() - np.array([policy.bridge.tau_low, policy.bridge.tau_high]))
            assume(exact.min() > 1e-6)  # else the last bit of a cosine decides
        upcoming = pending[0][0] if pending else None
        latents = theirs.chunk([noise.draw(index, step) for step in range(g.steps)], upcoming)
        step, memory = ours.advance(), ours.memory
        assert (step.window, step.segment, step.upcoming) == (theirs.frames, theirs.segment, upcoming)
        assert (step.switch and step.switch.mode) == (switch and switch[0])
        if step.switch and switch:
            close(step.switch.rho, switch[1], "rho", 1e-6)
        made = [(forward.start, forward.frames, forward.keys, forward.force_sink) for forward in forwards]
        assert made == theirs.forwards
        assert (memory.cache.local_end, memory.cache.global_end) == (theirs.L, theirs.G)
        assert (memory.bridge is None, len(memory.anchors)) == (theirs.bridge is None, len(theirs.anchors))
        for token, expected in zip(memory.anchors, theirs.anchors, strict=True):
            close(token, np.stack(expected), "anchor")
        if memory.bridge is not None and theirs.bridge is not None:
            close(memory.bridge, np.stack(theirs.bridge), "bridge")
            assert abs(memory.bridge_scale - theirs.scale) < 1e-6
        close(step.latents, latents, f"chunk {index}")
    memory.cache.check_integrity()
