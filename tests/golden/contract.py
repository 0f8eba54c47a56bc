"""docs/algorithm.md, sections 1 and 3 to 8, once more: in float64 numpy, as they are written, and slow.

Positions "windowed" and the policies other than "swift" are as docs/policy.md tells them. The backbone itself, section
2, is the package's: recordings and diffusers say that it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.export.models.schedule import Schedule
from swiftvideo.runtime.engine import Prompt
from swiftvideo.runtime.geometry import Geometry, PolicySettings, WindowSettings

Array = NDArray[np.float64]


def sigma(t: float, shift: float) -> float:
    """Section 1: sigma at the nearest time of the grid."""
    u = np.linspace(1, 0, 1001)[:-1]
    grid = shift * u / (1 + (shift - 1) * u)
    return float(grid[np.argmin(np.abs(1000 * grid - t))])


def attend(q: Array, k: Array, v: Array) -> Array:
    """2.5: [B,N,n,d], every query sees every key."""
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    o: Array = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    return o


def angles(frames: Sequence[int], width: int) -> Array:
    """2.7: of the time pairs of a head, [F,pairs]."""
    pairs = width // 2 - 2 * (width // 2 // 3)
    return np.array(frames, np.float64)[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)


def moved(k: Array, frames: int) -> Array:
    """Keys [B,N,n,d] as they would be `frames` later."""
    turn, out = angles([frames], k.shape[-1])[0], k.copy()
    even, odd = slice(0, 2 * len(turn), 2), slice(1, 2 * len(turn), 2)
    z = (k[..., even] + 1j * k[..., odd]) * np.exp(1j * turn)
    out[..., even], out[..., odd] = z.real, z.imag
    return out


def cosine(a: Array, b: Array) -> Array:
    """Of the last axes; norms floored at 1e-6."""
    floors = [np.maximum(np.sqrt(np.square(x).sum(-1)), 1e-6) for x in (a, b)]
    c: Array = (a * b).sum(-1) / (floors[0] * floors[1])
    return c


def window(s: WindowSettings, g: Geometry, current: int, segment: int, upcoming: int | None) -> int:
    """Section 7; a tau of 0 is its limit."""
    if not s.enabled:
        return g.window
    lo = max(g.sink + 1, min(max(3, g.window // 2) if s.min_size is None else s.min_size, g.window))
    post = g.window if s.tau_post is None else s.tau_post
    pre = 2 * g.chunk if s.tau_pre is None else s.tau_pre
    w = math.exp(-max(0, current - segment) / max(post, 1e-9))
    if upcoming is not None:
        w = max(w, math.exp(-max(0, upcoming - current) / max(pre, 1e-9)))
    return min(max(round(lo + (g.window - lo) * w), lo), g.window)


class Stream:
    """Sections 3, 5, 6 and 8: a video of B items."""

    def __init__(
        self,
        model: CausalWanModel,
        geometry: Geometry,
        settings: PolicySettings,
        schedule: Schedule,
        prompt: Prompt,
    ) -> None:
        self.model, self.g, self.s, self.prompt = model, geometry, settings, prompt
        self.P, self.shift = geometry.frame_tokens, schedule.shift
        *self.steps, self.context = map(float, schedule.passes)
        shape = (len(prompt.signature), geometry.window * self.P, geometry.heads, geometry.head_dim)
        self.slots = [(np.zeros(shape), np.zeros(shape)) for _ in range(geometry.layers)]
        self.L = self.G = self.base = self.current = self.segment = self.sink_frame = 0
        self.bridge: list[Array] | None = None
        self.scale = 0.0
        self.anchors: list[list[Array]] = []
        self.emitted: list[Array] = []
        self.forwards: list[tuple[int, int, int, bool]] = []
        """(start, frames, keys, force_sink)"""
        self.frames = geometry.window

    def forward(self, x: Array, t: float, start: int, force_sink: bool = False) -> Array:
        """Section 3."""
        P, S, W, origin = self.P, self.g.sink, self.g.window, self.base // self.P
        st, new, sink, frames = start * P, x.shape[1] * P, S * P, x.shape[1]
        end = st + new
        rec = end <= self.G and st > self.base
        ev = max(0, new + self.L - W * P) if end > self.G else 0
        le = self.L + end - self.G - ev
        ls = le - new
        ws = max(ls, sink) if rec and not force_sink else ls
        if ws == 0:
            self.sink_frame = start
        oldest = max(origin, start + frames - W)
        by = (oldest - self.sink_frame if ws else 0, oldest)
        by = by if self.s.positions == "windowed" else (0, 0)
        counts: list[int] = []

        def see(layer: int, q: Any, k: Any, v: Any) -> Any:
            """Self-attention of a layer, whose slots it moves on."""
            K, V = self.slots[layer]
            for cached, fresh in ((K, k), (V, v)):
                cached[:, sink : self.L - ev] = cached[:, sink + ev : self.L].copy()
                cached[:, ws:le] = fresh[:, ws - ls :]
            memory = [anchor[layer] * self.s.anchors.scale for anchor in self.anchors]
            memory += [] if self.bridge is None else [self.bridge[layer] * self.scale]
            budget = max(0, min(self.frames, W) * P - sink - sum(token.shape[1] for token in memory))
            recent = slice(max(sink, le - budget), le)
            placed = [moved(K[:, :sink], by[0]), *(moved(token, by[1]) for token in memory)]
            keys = np.concatenate([*placed, K[:, recent]], 1)
            counts.append(keys.shape[1])
            values = np.concatenate([V[:, :sink], *memory, V[:, recent]], 1)
            return torch.tensor(attend(q.double().numpy(), keys, values)).float()

        e, e0 = self.model.time_embed(torch.full(x.shape[:2], t))
        turn = torch.tensor(angles(range(start, start + frames), self.g.head_dim)).expand(*x.shape[:2], -1)
        given = (torch.tensor(x).float(), e, e0, turn.cos().float(), turn.sin().float(), *self.prompt.cross)
        flow = self.model(*given, attend=see)[0].double().numpy()
        if not rec:
            self.G, self.L = end, le
        self.forwards.append((start, frames, counts[0], force_sink))
        return flow

    def recache(self, frames: int, force_sink: bool) -> None:
        """8: the last frames again, under the running prompt."""
        frames = min(frames, self.g.window, self.current - self.base // self.P)
        self.frames = self.g.window
        if frames:
            self.forward(np.stack(self.emitted[-frames:], 1), self.context, self.current - frames, force_sink)

    def tokens(self, rho: Array, delta: Array) -> tuple[list[Array], list[Array]]:
        """Sections 5 and 6 of every layer: bridge [B,2,n,d] and anchor [B,1,n,d]. delta [B,n,d]."""
        P, L, bridges, anchors = self.P, self.L, [], []
        recent = self.g.chunk if self.s.anchors.recent is None else self.s.anchors.recent
        for _, slots in self.slots:
            v, d, mix = slots[:, :L], delta, self.s.anchors.mix
            if L >= 2 * P:
                mu = v[:, L - P :].mean(1) - v[:, L - 2 * P : L - P].mean(1)
                square = np.square(mu).sum(-1, keepdims=True)
                d = np.where(square <= 1e-6, d, d - (d * mu).sum(-1, keepdims=True) / (square + 1e-6) * mu)
            r = v[:, L - min(L, self.s.bridge.recent * P) :].mean(1)
            s = v[:, : self.g.sink * P].mean(1) if self.g.sink else r
            gates = [(rho[:, None] * np.clip(cosine(b, d), 0, 1))[..., None] for b in (s, r)]
            bridges.append(np.stack([(1 - g) * b + g * d for g, b in zip(gates, (s, r), strict=True)], 1))
            tail = v[:, L - min(L, recent * P) :].mean(1)
            old = self.prompt.signature.reshape(delta.shape)
            anchors.append(((1 - mix) * tail + mix * old)[:, None])
        return bridges, anchors

    def switch(self, prompt: Prompt) -> tuple[str, Array]:
        """8.1: mode and rho."""
        b, a = self.s.bridge, self.s.anchors
        old, new = (p.signature.astype(np.float64) for p in (self.prompt, prompt))
        rho = np.clip(1 - cosine(old, new), 0, 1)
        bridge = anchor = None
        if self.L:
            bridge, anchor = self.tokens(rho, (new - old).reshape(-1, self.g.heads, self.g.head_dim))
        self.prompt, self.segment = prompt, self.current
        mode: str = self.s.policy
        if mode == "cut":
            self.bridge, self.anchors, self.L = None, [], 0
            self.base = self.G = self.current * self.P
        elif mode == "recache" or (mode == "swift" and (not b.enabled or rho.max() >= b.tau_high)):
            self.bridge = None
            self.recache(self.g.window, not self.s.global_sink)
            mode = "full-recache"
        elif mode == "swift":
            self.bridge, self.scale, mode = bridge, b.scale, "bridge-only"
            if rho.max() >= b.tau_low:
                self.recache(self.g.chunk if b.micro is None else b.micro, False)
                mode = "bridge+micro-recache"
        if self.s.policy == "swift" and a.enabled and a.max and anchor is not None:
            self.anchors = [*self.anchors, anchor][-a.max :]
        return mode, rho

    def chunk(self, noises: list[Array], upcoming: int | None) -> Array:
        """8.2 to 8.5: the chunk's latents. noises: the start, and what is added after each step but the last."""
        self.frames = self.g.window
        if self.s.policy == "swift":
            self.frames = window(self.s.window, self.g, self.current, self.segment, upcoming)
        x = x0 = noises[0].astype(np.float64)
        for step, t in enumerate(self.steps):
            x0 = x - sigma(t, self.shift) * self.forward(x, t, self.current)
            if step + 1 < len(self.steps):
                s = sigma(self.steps[step + 1], self.shift)
                x = (1 - s) * x0 + s * noises[step + 1]
        self.forward(x0, self.context, self.current)
        self.emitted += [x0[:, frame] for frame in range(self.g.chunk)]
        self.current += self.g.chunk
        self.scale *= self.s.bridge.decay
        if self.scale < 1e-3:
            self.bridge = None
        return x0
