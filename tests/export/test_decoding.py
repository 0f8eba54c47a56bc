"""How the engine for GPUs decodes, rehearsed on the CPU: layouts, threads, what is compiled and what cuDNN tries."""

from __future__ import annotations

import gc
import weakref
from threading import Thread, current_thread
from typing import Any

import numpy as np
import pytest
import torch

from swiftvideo.export.convolutions import TRIALS, channels_last, fastest
from swiftvideo.export.cuda import compile_decoding
from swiftvideo.export.models.vae import StreamingDecoder
from swiftvideo.runtime.errors import ClosedError, OutOfMemoryError

from . import small
from .rehearsal import engines

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def test_layouts_do_not_change_the_frames() -> None:
    plain, changed = small.checkpoint().vae, small.checkpoint().vae
    channels_last(changed)
    latents = torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    made = []
    with torch.no_grad():
        for decoder in (plain, changed):
            _, caches = decoder.decode_first_float(latents[:, :1])
            made.append(decoder.decode_float(latents, caches)[0])
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)


def test_the_decoder_compiles_as_one_graph() -> None:
    """And gives the same frames, in a stream too."""
    import torch._dynamo as dynamo

    dynamo.reset()
    decoder = small.checkpoint().vae
    channels_last(decoder)
    compiled = torch.compile(decoder.decode, dynamic=False, backend="aot_eager", fullgraph=True)
    latents = torch.randn(1, 7, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, theirs = decoder.decode_first(latents[:, :1])
        ours = list(theirs)
        for start in (1, 4):
            expected, theirs = decoder.decode(latents[:, start : start + 3], theirs)
            made, ours = compiled(latents[:, start : start + 3], ours)
            assert int((made.int() - expected.int()).abs().max()) <= 1
    dynamo.reset()


def test_the_decoder_is_compiled_with_what_saves_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor is asked for, as it gets it; torch.compile refuses names that Inductor does not know."""
    import torch._inductor.compile_fx as inductor

    asked: list[Any] = []

    def compile_fx(graph: Any, inputs: Any, config_patches: Any = None, **_: Any) -> Any:
        asked.append(config_patches)
        return graph.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    compiled = compile_decoding(torch.relu)
    assert compiled(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    assert asked == [{"realize_reads_threshold": 16}]
    torch._dynamo.reset()


def test_the_decoder_stays_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that do not are concatenated to inputs that do not, in every chunk: a copy before each convolution."""
    seen: list[torch.Tensor] = []

    def last(value: torch.Tensor) -> bool:
        return value.is_contiguous(
            memory_format=torch.channels_last_3d if value.ndim == 5 else torch.channels_last
        )

    def as_cudnn(name: str) -> Any:
        original = getattr(torch.nn.functional, name)

        def convolve(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            seen.append(x)
            made: torch.Tensor = original(x, weight, *rest, **more)
            layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
            return made.contiguous(memory_format=layout) if last(x) or last(weight) else made

        return convolve

    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(torch.nn.functional, name, as_cudnn(name))
    _, engine = engines()
    g = engine.geometry
    shape = (1, g.chunk, g.latent_channels, g.latent_height, g.latent_width)
    latents = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    session = engine.open()
    for _ in range(2):
        seen.clear()
        session.decode(latents)
        assert session.vae_caches and all(map(last, session.vae_caches))
    assert len(seen) > 5 and all(map(last, seen[1:])), "but for the latents"
    other = engine.open()
    other.import_state(session.export_state())
    assert other.vae_caches and all(map(last, other.vae_caches))


def test_only_whole_chunks_are_decoded_by_what_was_compiled() -> None:
    """A video's first chunk has a frame less: compiling that too takes as long again, for once in a video."""
    _, engine = engines()
    plain, compiled = engine._decode, []
    engine._decode = lambda latents, caches: compiled.append(latents.shape[1]) or plain(latents, caches)
    g = engine.geometry
    session = engine.open()
    for frames in (g.chunk, g.chunk, g.chunk - 1):
        session.decode(np.zeros((1, frames, g.latent_channels, g.latent_height, g.latent_width), np.float32))
    assert compiled == [g.chunk]


def test_one_thread_decodes_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's plans are the thread's that made them, and take seconds: a server warms up on another one."""
    threads, decode = [], StreamingDecoder.decode

    def watched(*arguments: Any) -> Any:
        threads.append(current_thread())
        assert not torch.is_grad_enabled(), "which is the thread's own, too"
        return decode(*arguments)

    monkeypatch.setattr(StreamingDecoder, "decode", watched)
    for caller in (Thread.start, Thread.start, Thread.run):
        _, engine = engines()
        g, session = engine.geometry, engine.open()
        latents = np.zeros((1, 2, g.latent_channels, g.latent_height, g.latent_width), np.float32)
        work = Thread(target=session.decode, args=(latents,))
        caller(work)
        if caller is Thread.start:
            work.join()
        session.close()
    assert len(threads) == 3 and len(set(threads)) == 1 and threads[0] is not current_thread()


def test_what_decoding_raises_comes_to_who_asked_and_is_freed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, engine = engines()
    session = engine.open()
    seen = weakref.ref(session)

    def failing(*_: Any) -> Any:
        raise OutOfMemoryError("full")

    monkeypatch.setattr(engine.decoder, "decode_first", failing)
    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError, match="full"):
            session.decode(np.zeros((1, 1, 1, 1, 1), np.float32))
        session.close()
        del session
        assert seen() is None, "a cycle would keep its memory"
    finally:
        gc.enable()


def test_what_was_asked_of_a_session_that_closed_meanwhile_makes_nothing() -> None:
    """As where Ctrl-C ends the wait for it."""
    _, engine = engines()
    session = engine.open()

    def refused() -> None:
        with pytest.raises(ClosedError):
            session.decode(np.zeros(1, np.float32))
        seen.append("refused")

    seen: list[str] = []
    waiting = Thread(target=refused)
    with engine.decoding():
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        session.close()
    waiting.join(10)
    assert seen == ["refused"] and session.vae_caches is None


def test_algorithms_are_tried_for_whole_chunks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each: a video's first frame, and what is left of its first chunk, are done once."""
    _, engine = engines()
    seen: list[tuple[int, bool]] = []

    def watched(name: str) -> Any:
        real = getattr(engine.decoder, name)

        def decode(latents: torch.Tensor, *caches: Any) -> Any:
            seen.append((latents.shape[1], torch.backends.cudnn.benchmark))
            return real(latents, *caches)

        return decode

    for name in ("decode_first", "decode"):
        monkeypatch.setattr(engine.decoder, name, watched(name))
    engine._decode = engine.decoder.decode  # type: ignore[union-attr]
    g, session = engine.geometry, engine.open()
    for _ in range(2):
        session.decode(np.zeros((1, g.chunk, g.latent_channels, g.latent_height, g.latent_width), np.float32))
    assert seen == [(1, False), (g.chunk - 1, False), (g.chunk, True)]
    assert not torch.backends.cudnn.benchmark, "the process's own setting is what it was"


def test_trials_are_the_callers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cudnn, "benchmark_limit", 10)
    monkeypatch.setattr(cudnn, "benchmark", True)
    with pytest.raises(RuntimeError), fastest(tried=False):
        assert (cudnn.benchmark, cudnn.benchmark_limit) == (False, TRIALS)
        raise RuntimeError
    assert (cudnn.benchmark, cudnn.benchmark_limit) == (True, 10)
