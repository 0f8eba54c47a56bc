"""What the numbers of the GPU's engine are compared with, and that they find an attention that is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from swiftvideo.export import chunk_forward  # noqa: E402
from swiftvideo.export.cuda import CudaEngine, CudaSession, Options  # noqa: E402
from swiftvideo.export.torch_engine import TorchSession  # noqa: E402
from tests.export import small  # noqa: E402

from .engine import rehearsed  # noqa: E402
from .model import Bench  # noqa: E402
from .numbers import error, limit, numbers, passed  # noqa: E402
from .record import Record  # noqa: E402

Broken = Callable[..., Any]
right = CudaEngine.attend


def zeros(engine: CudaEngine, q: Any, *rest: Any) -> Any:
    return torch.zeros_like(q)


def first_layer(engine: CudaEngine, *arguments: Any) -> Any:
    return right(engine, *arguments[:6], 0, *arguments[7:])


def without_cache(engine: CudaEngine, *arguments: Any) -> Any:
    segments = arguments[5].clone()
    if arguments[3].shape[2] > engine.geometry.rows:  # a chunk's block, which ends with the fresh rows
        segments[:, 0] = torch.tensor([engine.geometry.rows, arguments[0].shape[1]])
    else:
        segments *= segments[..., :1] >= engine.geometry.rows
    return right(engine, *arguments[:5], segments, *arguments[6:])


def without_recaches(engine: CudaEngine, q: Any, *rest: Any) -> Any:
    g = engine.geometry
    return right(engine, q, *rest) if q.shape[1] == g.chunk * g.frame_tokens else torch.zeros_like(q)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def figures(bench: Bench, options: Options | None = None) -> dict[str, dict[str, Any]]:
    record = Record(None, {})
    with torch.no_grad():
        numbers(bench, lambda: bench.engine(options), record)
    found: dict[str, dict[str, Any]] = record.figures["numbers"]
    return found


@pytest.mark.parametrize("attention", [right, zeros, first_layer, without_cache, without_recaches])
def test_a_broken_attention_is_refused(attention: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaEngine, "attend", attention)
    found = figures(in_bfloat16())
    assert passed(found, "bf16") == (attention is right), found
    forwards = {case: row for case, row in found.items() if "x0" in row}
    assert len(forwards) == 5 and set(forwards) > {"recache of 12 frames", "whole window"}
    wrong = [case for case, row in forwards.items() if not passed({case: row}, "bf16")]
    if attention is without_recaches:
        assert wrong == ["recache of 12 frames"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_broken_attention_of_the_library_is_refused(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken:
        monkeypatch.setattr(chunk_forward, "library_attention", lambda name, q, *rest: torch.zeros_like(q))
    found = figures(in_bfloat16(), Options(attention="cudnn"))
    assert passed(found, "bf16") != broken, found
    assert passed({"whole window": found["whole window"]}, "bf16") != broken


def in_bfloat16() -> Bench:
    """Over hundreds of keys, as on the GPU, where losing the attention would be lost among roundings."""
    source = small.checkpoint()
    return Bench(source.backbone.bfloat16(), source.vae, source.geometry(64, 96), source.schedule)


def test_the_reference_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine beside it sets for the process: no TF32, no algorithms by trial."""
    seen = []

    def watched(name: str) -> Any:
        original = getattr(TorchSession, name)

        def call(session: TorchSession, *arguments: Any) -> Any:
            if not isinstance(session, CudaSession):
                cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
                seen.append((name, cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, precision))
            return original(session, *arguments)

        return call

    for name in ("denoise", "decode"):
        monkeypatch.setattr(TorchSession, name, watched(name))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.set_float32_matmul_precision("high")
    try:
        assert passed(figures(rehearsed()), "fp32")
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {name for name, *_ in seen} == {"denoise", "decode"}
    assert {tuple(flags) for _, *flags in seen} == {(True, False, False, "highest")}


def test_limits() -> None:
    assert passed({"a case": {"x0": 1e-4}, "decoding": {"levels of 3 latent frames": 1.0}}, "fp32")
    assert not passed({"a case": {"x0": 2e-3}}, "fp32")
    assert not passed({"a case": {"x0": 5e-2}}, "bf16") and passed({"a case": {"bridge": 5e-2}}, "bf16")
    assert not passed({"decoding": {"levels of 3 latent frames": 2.0}}, "fp32")
    assert not passed({"a case": {"x0": float("nan")}}, "bf16")
    assert not passed({"prompts": {"cross_k": 0.0}, "a case": {"error": "Traceback"}}, "bf16")
    assert not passed({}, "bf16")
    assert limit("fresh_v", "bf16") < limit("latents after 1 chunks", "bf16")
    assert error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
