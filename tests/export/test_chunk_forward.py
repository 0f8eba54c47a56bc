"""The chunk's forward that all sessions of a GPU's engine share, rehearsed on the CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Thread, get_ident
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swiftvideo.export import chunk_forward
from swiftvideo.export.chunk_forward import ChunkForward
from swiftvideo.export.cuda import CudaEngine, Options
from swiftvideo.export.torch_engine import copy_rows
from swiftvideo.runtime.errors import ClosedError, OutOfMemoryError, UsageError
from swiftvideo.runtime.geometry import BridgeSettings, PolicySettings, WindowSettings
from swiftvideo.runtime.positions import time_tables
from swiftvideo.runtime.rollout import Step
from tests.gpu.model import padded

from .rehearsal import engines, switching


def test_a_recache_leaves_nothing_behind() -> None:
    """K and V of its frames are many times a chunk's."""
    _, engine = engines()
    chunk = engine.geometry.chunk
    rollout = switching(engine, PolicySettings(policy="recache"))
    session: Any = rollout.tensors
    seen, commit = [], session.commit

    def committed(ranges: Any) -> None:
        made = [weakref.ref(value) for value in session.fresh]
        frames = session.fresh[0].shape[2] // engine.geometry.frame_tokens
        shared = session.fresh[0] is engine.forwards[1].fresh[0]
        commit(ranges)
        seen.append((frames, shared, [value() is not None for value in made]))

    session.commit = committed
    for _ in range(3):
        rollout.advance()
    assert seen == [
        (chunk, True, [True, True]),
        (chunk, True, [True, True]),
        (2 * chunk, False, [False, False]),
        (chunk, True, [True, True]),
    ]
    with pytest.raises(UsageError, match="nothing to commit"):
        session.commit = commit
        session.commit(np.array([[0, 6, 1]], np.int32))
    rollout.close()


@pytest.mark.parametrize("attention", ["kernel", "cudnn"])
def test_sessions_take_turns_between_any_two_passes(attention: Any) -> None:
    """They share the chunk's buffers: each must find its own latents, prompt, keys, and K and V to commit."""
    _, engine = engines(options=Options(attention=attention))
    seeds = (1, 2)
    alone = [[chunk.latents for chunk in _chunks(engine, seed)] for seed in seeds]
    order = Turns(engine, len(seeds))
    together: list[Any] = [None, None]

    def play(number: int) -> None:
        with order.of(number):
            together[number] = [chunk.latents for chunk in _chunks(engine, seeds[number])]

    threads = [Thread(target=play, args=(number,)) for number in range(len(seeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order.turns > 4 * 5 * len(seeds), "they did take turns"
    assert not np.allclose(alone[0], alone[1])
    np.testing.assert_allclose(together, alone, atol=1e-5)  # torch has other numbers of threads in threads


def _chunks(engine: CudaEngine, seed: int) -> list[Step]:
    """Of a video whose prompt changes in its third chunk."""
    rollout = switching(engine, PolicySettings(bridge=BridgeSettings(tau_low=2.0, tau_high=2.0)), seed)
    made = [rollout.advance() for _ in range(5)]
    rollout.close()
    return made


class Turns:
    """Lets threads run one pass each in turn: before a thread goes on after its pass, each other one has run one."""

    def __init__(self, engine: CudaEngine, count: int) -> None:
        self.engine, self.count, self.turns = engine, count, 0
        self.next, self.left = 0, set[int]()
        self.changed = Condition()
        self.number: dict[int, int] = {}

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        forward: Any = self.engine.forwards[1]
        with self.changed:
            self.number[get_ident()] = number
            if not hasattr(forward, "_alone"):
                forward._alone, forward.run = forward.run, self.run
        yield
        with self.changed:
            self.left.add(number)
            self.changed.notify_all()

    def run(self, *arguments: Any) -> None:
        mine = self.number[get_ident()]
        others = set(range(self.count)) - {mine}
        self.engine.forwards[1]._alone(*arguments)  # type: ignore[attr-defined]
        self.engine.lane._held.release()  # denoise() has taken it
        with self.changed:
            self.turns += 1
            self.next = (mine + 1) % self.count
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.next == mine or others <= self.left, 60)
        self.engine.lane._held.acquire()


def test_keys_are_gathered_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where the cache changed, or another session came between."""
    _, engine = engines()
    rollouts = [switching(engine, PolicySettings()) for _ in range(2)]
    held: list[Any] = []
    gather = ChunkForward._gather

    def counted(self: Any, session: Any, segments: Any) -> int:
        before = self._held
        shown = gather(self, session, segments)
        held.append(self._held is not before)
        return shown

    monkeypatch.setattr(ChunkForward, "_gather", counted)
    for rollout in (rollouts[0], rollouts[0], rollouts[1]):
        held.clear()
        rollout.advance()
        assert held == [True, False, False, False, False]


def test_memory_of_a_session_is_its_cache() -> None:
    """Chunks' buffers and graphs are the engine's: sixteen sessions have no more of them than one."""
    _, engine = engines()
    a, b = engine.open(), engine.open()
    assert a.forward is b.forward is engine.forwards[1]
    assert a.cache_k.data_ptr() != b.cache_k.data_ptr()
    g = engine.geometry
    latents = np.ones((1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32)
    a.load(latents)
    b.load(2 * latents)
    assert a.latents is not None and float(a.latents.max()) == 1
    assert engine.open(2).forward is not a.forward


def test_the_library_has_a_graph_for_every_window_of_whole_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tables with less than all fresh rows, or parts of frames, are the kernel's."""
    _, engine = engines(options=Options(attention="cudnn"))
    g, used = engine.geometry, []
    assert engine.attention is None
    session, chunk = engine.open(), engine.forwards[1]
    attend = engine.attend
    chunk.module.attention = lambda *given: (
        used.append(chunk._serving[0]) or ChunkForward._attention(chunk, *given)
    )  # type: ignore[method-assign, func-returns-value]
    monkeypatch.setattr(engine, "attend", lambda *given: used.append(-1) or attend(*given))
    (prompt,) = [engine.condition(np.ones((1, g.text_len, g.text_dim), np.float32))]
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    times = time_tables(3, g.chunk, g.time_pairs)
    first, fresh = g.memory_rows, (g.rows, g.chunk * g.frame_tokens)
    tables = {
        "the chunk alone": ([fresh], fresh[1]),
        "two frames before it": ([(first, 2 * g.frame_tokens), fresh], fresh[1] + 2 * g.frame_tokens),
        "the same, in pieces": (
            [
                (first + 9, 1),
                (first, 9),
                (first + 12, 2 * g.frame_tokens - 10),
                (g.rows, 4),
                (g.rows + 4, fresh[1] - 4),
            ],
            fresh[1] + 2 * g.frame_tokens,
        ),
        "a row too many": ([(0, 1), fresh], 0),
        "fresh rows left out": ([(first, 2), (g.rows + 2, fresh[1] - 2)], 0),
    }
    session.load(np.zeros(shape, np.float32))
    session.denoise(4, None, *times, padded([fresh]), prompt)
    for name, (rows, shown) in tables.items():
        used.clear()
        session.load(np.zeros(shape, np.float32))
        session.denoise(4, None, *times, padded(rows), prompt)
        expected = [shown] if shown else [0, -1]
        assert used == expected * g.layers, name
    assert engine.attention == "cudnn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [6, 24, 128])
def test_rows_are_copied_bit_for_bit(dtype: torch.dtype, width: int) -> None:
    source = torch.randn(2, 2, 7, 3, width).to(dtype)
    source[:, :, 2] = float("nan")
    target = torch.zeros(2, 2, 9, 3, width, dtype=dtype)
    copy_rows(target[:, :, 3:6], source[:, :, 1:4])
    torch.testing.assert_close(target[:, :, 3:6], source[:, :, 1:4], rtol=0, atol=0, equal_nan=True)
    assert not target[:, :, :3].any() and not target[:, :, 6:].any()


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.31 GiB")

    _, engine = engines()
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(
        OutOfMemoryError, match=r"no memory for K and V of a window, batch 3, on cpu .* 4.31 GiB"
    ):
        engine.open(3)


def test_memory_that_is_not_there_for_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk misses it, and can be made again."""
    _, engine = engines()
    rollout, captures = switching(engine, PolicySettings()), []

    def capture(work: Any, *_: Any) -> Any:
        captures.append(work)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 412 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine.lane, "capture", capture)
        with pytest.raises(OutOfMemoryError, match=r"no memory for the forward over a chunk .* 412 MiB"):
            rollout.advance()
    assert len(captures) == 1 and engine.attention is None
    rollout.advance()
    assert engine.attention == "kernel"
    rollout.close()


TIMES = {
    "cuDNN is faster": ([2.0, 1.0, 1.5], "cudnn"),
    "flash attention is faster": ([2.0, 1.5, 1.0], "flash"),
    "the kernel is": ([1.0, 2.0, 3.0], None),
    "as fast, but for noise": ([1.0, 0.97, 3.0], None),
    "cuDNN refuses": ([2.0, RuntimeError("cuDNN Frontend error: no plan"), 1.0], "flash"),
    "torch has none": ([2.0, RuntimeError("no"), RuntimeError("none")], None),
}


@pytest.mark.parametrize("name", TIMES)
def test_the_fastest_attention_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times, chosen = TIMES[name]
    _, engine = engines()
    engine.open()
    seen, left = [], list(times)

    def milliseconds(work: Any, _: int) -> float:
        work()
        value = left.pop(0)
        if isinstance(value, RuntimeError):
            raise value
        return value

    def library(name: str, q: Any, k: Any, *_: Any) -> Any:
        seen.append((name, k.shape[1]))
        return q

    monkeypatch.setattr(chunk_forward, "library_attention", library)
    monkeypatch.setattr(engine.lane, "milliseconds", milliseconds)
    assert engine.forwards[1]._fastest() == chosen
    steady = WindowSettings().min_size
    assert steady is not None and engine.geometry.chunk < steady < engine.geometry.window
    keys = steady * engine.geometry.frame_tokens
    assert seen == [("cudnn", keys), ("flash", keys)]
    said = [str(t) if isinstance(t, RuntimeError) else t for t in times]
    assert list(engine.attention_ms.items()) == list(zip(("kernel", "cudnn", "flash"), said, strict=True))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no MiB"), torch.AcceleratorError("illegal address", 700)]
)
def test_a_gpu_that_fails_is_no_choice(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(*_: Any) -> float:
        raise error

    _, engine = engines()
    engine.open()
    monkeypatch.setattr(engine.lane, "milliseconds", milliseconds)
    with pytest.raises(type(error)):
        engine.forwards[1]._fastest()


@pytest.mark.parametrize("wanted", ["fastest", "cudnn"])
def test_a_window_that_torch_refuses_leaves_the_kernel(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody insists on torch's attention: then it is an error, at every chunk."""
    _, engine = engines(options=Options(attention=wanted))
    rollout, calls = switching(engine, PolicySettings()), []

    def library(name: str, q: Any, k: Any, *_: Any) -> Any:
        calls.append(k.shape[1])
        if k.shape[1] > 2 * q.shape[1]:
            raise RuntimeError("cuDNN Frontend error: no plan")
        return q

    monkeypatch.setattr(chunk_forward, "library_attention", library)
    monkeypatch.setattr(engine.lane, "capture", lambda work, *_: (work(), work)[1])
    if wanted == "cudnn":
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no plan"):
                rollout.advance()
        return
    monkeypatch.setattr(engine.forwards[1], "_fastest", lambda: "cudnn")
    monkeypatch.setattr(engine, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(engine, "model", SimpleNamespace(dtype=torch.bfloat16))
    engine.forwards[1]._prepare()
    monkeypatch.undo()
    assert engine.attention == "kernel" and engine.attention_ms == {"cudnn": "cuDNN Frontend error: no plan"}
    before = len(calls)
    rollout.advance()
    assert len(calls) == before > 1


@pytest.mark.parametrize("interrupted", ["keys", "prompt"])
def test_a_pass_that_is_interrupted_harms_no_other_session(
    interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half copied is nobody's."""
    _, engine = engines()
    g = engine.geometry
    a, b = engine.open(), engine.open()
    for session, value in ((a, 1.0), (b, 2.0)):
        session.cache_k.fill_(value)
        session.cache_v.normal_(generator=torch.Generator().manual_seed(int(value)))
    prompts = [engine.condition(np.full((1, 2, g.text_dim), value, np.float32)) for value in (1, -1)]
    table = padded([(g.memory_rows, 2 * g.frame_tokens), (g.rows, g.chunk * g.frame_tokens)])
    latents = np.ones((1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32)

    def go_on(session: Any, prompt: Any) -> Any:
        session.load(latents)
        session.denoise(4, None, *time_tables(3, g.chunk, g.time_pairs), table, prompt)
        return session.x0()

    first = go_on(a, prompts[0])
    done: list[int] = []

    def copy(target: Any, source: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        target.copy_(source)

    with monkeypatch.context() as patch:
        if interrupted == "keys":
            patch.setattr(chunk_forward, "copy_rows", copy)
        else:
            k, _ = prompts[1].cross
            patch.setattr(engine, "crossed", lambda _: (k, torch.zeros(5)))
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            go_on(b, prompts[1])
    np.testing.assert_array_equal(go_on(a, prompts[0]), first)


def test_a_closed_engine_makes_no_chunks() -> None:
    _, engine = engines()
    rollout = switching(engine, PolicySettings())
    rollout.advance()
    engine.close()
    with pytest.raises(ClosedError, match="the engine was closed"):
        rollout.advance()


def test_a_closed_engine_is_freed_at_once() -> None:
    _, engine = engines()
    rollout = switching(engine, PolicySettings())
    rollout.advance()
    forward, model = weakref.ref(engine.forwards[1]), weakref.ref(engine.model)
    rollout.close()
    gc.collect()
    gc.disable()
    try:
        engine.close()
        engine.close()
        del engine, rollout
        assert forward() is None and model() is None
    finally:
        gc.enable()
