"""An engine whose sessions remember what they were asked to do, and a session that waits within a chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
import pytest

from swiftvideo.runtime import Engine, PolicySettings, Prompt, Session
from swiftvideo.runtime.memory import Forward
from swiftvideo.runtime.noise import PhiloxNoise
from swiftvideo.runtime.rollout import Rollout


class WatchedSession:
    """Passes every call on and keeps its name with copies of its arguments."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: list[tuple[str, list[Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        target: Callable[..., Any] = getattr(self.inner, name)

        def call(*arguments: Any) -> Any:
            kept = [item.copy() if isinstance(item, np.ndarray) else item for item in arguments]
            self.calls.append((name, kept))
            return target(*arguments)

        return call

    def named(self, name: str) -> list[list[Any]]:
        """Arguments of every call of `name`."""
        return [arguments for called, arguments in self.calls if called == name]

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class WatchedEngine:
    """See the module."""

    def __init__(self, engine: Engine) -> None:
        self.inner, self.name, self.geometry = engine, engine.name, engine.geometry
        self.encode, self.condition, self.close = engine.encode, engine.condition, engine.close

    def open(self, batch: int = 1) -> WatchedSession:
        return WatchedSession(self.inner.open(batch))


class Run:
    """A rollout on a watched engine, with the forwards that it made."""

    def __init__(self, engine: Engine, prompt: Prompt, settings: PolicySettings, noise: Any = None) -> None:
        self.forwards: list[Forward] = []
        watched: Any = WatchedEngine(engine)
        g = engine.geometry
        shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
        self.rollout = Rollout(
            watched, settings, prompt, noise or PhiloxNoise(5, shape), observer=self.forwards.append
        )
        self.memory, self.cache = self.rollout.memory, self.rollout.memory.cache
        self.tensors: Any = self.rollout.tensors

    def chunks(self, count: int) -> list[Any]:
        return [self.rollout.advance() for _ in range(count)]

    def switch(self, prompt: Prompt) -> Any:
        """Ask for `prompt` and make one chunk, with nothing remembered from before it."""
        self.rollout.ask(prompt)
        self.forwards.clear()
        self.tensors.calls.clear()
        return self.rollout.advance()

    def rows(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Copies of K and V, [L,1,R,n,d]."""
        state = self.tensors.inner.export_state()
        return state["cache_k"], state["cache_v"]


def turned(old: Prompt, new: Prompt, rho: float) -> Prompt:
    """`new` with a signature whose strength against `old` is `rho`, 0 to 1."""
    a = old.signature.astype(np.float64)
    b = new.signature - a * (new.signature * a).sum() / (a * a).sum()
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    signature = (1 - rho) * a + np.sqrt(1 - (1 - rho) ** 2) * b
    return dataclasses.replace(new, signature=signature.astype(np.float32))


class Shifted:
    """The noise of `source` from chunk 0 for the chunks from `first` on, and other noise before."""

    def __init__(self, first: int, source: Any, before: int = 0) -> None:
        self.first, self.source, self.before = first, source, before

    def draw(self, chunk: int, step: int) -> Any:
        if self.before:
            return self.source.draw(chunk + (self.before if chunk < self.first else 0), step)
        return self.source.draw(chunk - self.first, step)


def held(session: Session, monkeypatch: pytest.MonkeyPatch) -> tuple[Event, Event]:
    """Let decodings of a session wait: whether one has begun, and whether they may go on."""
    inside, go_on = Event(), Event()
    tensors: Any = session._rollout.tensors
    decode = tensors.decode

    def slow(latents: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return decode(latents)

    monkeypatch.setattr(tensors, "decode", slow)
    return inside, go_on
