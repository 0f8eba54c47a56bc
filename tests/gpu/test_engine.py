"""The program that measures the torch engine: it refuses without a GPU, and its rehearsal runs to the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLWan  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from swiftvideo.export.models.backbone import PRESETS, CausalWanModel, full_attention  # noqa: E402
from swiftvideo.export.models.vae import StreamingDecoder  # noqa: E402

from . import convolutions, engine, model  # noqa: E402

TINY = {"gflop_per_s": 1.0}


def test_it_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert engine.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "engine.json"
    arguments = ["--rehearse", "--chunks", "40", "--repeats", "1", "--json", str(path)]
    assert engine.main(arguments) == 0
    made = json.loads(path.read_text())
    assert made["passed"] and made["numbers"]["chunks"]["latents after 3 chunks"] < 1e-3
    assert {name: len(row) for name, row in made["ablations"].items()} == {
        name: len(parts) for name, (_, parts) in engine.ABLATIONS.items()
    }
    assert made["video"]["with_vae"]["frames_per_second"] > 0 and not made["failed"]
    assert set(made["video"]) == {
        *engine.VIDEOS,
        "memory of sessions, MiB",
        *(f"switch, {name}: extra ms" for name in engine.SWITCHES),
    }
    assert {"forward, window 12", "forward, window 12, gathering its keys"} < set(made["stages"])
    assert made["profile"] and made["attention"] == {"chosen": "kernel", "ms": {}}
    shapes = made["convolutions"].pop("shapes")
    assert set(made["convolutions"]) == set(shapes) and sum(times for *_, times in shapes.values()) > 10
    for row in made["convolutions"].values():
        assert row["difference"] < 1e-5 and row["2d_ms"] > 0 and row["3d_share"] > 0


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the rehearsal of the stages with other numbers, sections, limits; gives exit code and figures."""
    monkeypatch.setattr(engine, "cpu_limits", lambda threads: TINY)

    def run(*arguments: str, error: float = 0.0) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(
            engine, "numbers", lambda bench, made, record: record.put("numbers", "case", value={"x0": error})
        )
        path = tmp_path / "engine.json"
        code = engine.main(
            ["--rehearse", "--repeats", "1", "--only", "stages", "--json", str(path), *arguments]
        )
        return code, json.loads(path.read_text())

    return run


def test_wrong_numbers_are_not_timed_unless_told(program: Any) -> None:
    code, made = program(error=1.0)
    assert code == 1 and made["passed"] is False and "stages" not in made
    code, made = program("--time-anyway", error=1.0)
    assert code == 1 and made["stages"]["decode"]["ms"] > 0
    code, made = program("--skip-numbers", error=1.0)
    assert code == 0 and "numbers" not in made and made["stages"]["decode"]["ms"] > 0


def test_one_failure_loses_nothing_else(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.forward

    def forward(bench: Any, made: Any, window: int, changed: bool = False) -> Any:
        if window == 8:
            raise RuntimeError("misaligned address")
        return original(bench, made, window, changed)

    monkeypatch.setattr(engine, "forward", forward)
    code, made = program()
    assert code == 1 and made["passed"] and made["failed"] == ["stages/forward, window 8"]
    assert "misaligned address" in made["stages"]["forward, window 8"]["error"]
    assert all(made["stages"][f"forward, window {window}"]["ms"] > 0 for window in (7, 9, 10, 11, 12))


def test_the_engine_does_without_what_fails(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads where nothing is ends a process's CUDA context: all else would be lost with it."""
    made: list[Any] = []
    original = model.CudaEngine.__init__

    def watched(self: Any, *arguments: Any, options: Any = None, **more: Any) -> None:
        made.append(options)
        original(self, *arguments, options=options, **more)

    monkeypatch.setattr(model.CudaEngine, "__init__", watched)
    code, figures = program("--without", "kernels", "graphs")
    assert code == 0 and figures["without"] == ["kernels", "graphs"] and figures["stages"]["decode"]["ms"] > 0
    assert made == [engine.Options(kernels=False, graphs=False)]
    assert set(engine.SWITCHED) == {
        *("graphs", "kernels", "compiled", "joined_gelu", "placed_keys", "channels_last")
    }


def test_the_attention_can_be_named(program: Any) -> None:
    """One that is not chosen here has to be right before it can be."""
    code, figures = program("--attention", "cudnn")
    assert code == 0 and figures["attention"]["chosen"] == "cudnn"


def test_without_limits_there_are_times(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cpu_limits", lambda threads: 1 / 0)
    code, made = program()
    assert code == 1 and made["failed"] == ["limits"]
    assert set(made["stages"]["decode"]) == {"ms", "gflop"}


def test_the_convolutions_are_those_of_the_decoder() -> None:
    """At full size they are nine tenths of its work."""
    with torch.device("meta"):
        decoder = StreamingDecoder(AutoencoderKLWan())
    found = convolutions.of_a_chunk(decoder, (1, 3, 16, engine.HEIGHT // 8, engine.WIDTH // 8))
    flop = sum(
        2 * times * (x[2] - 2) * x[3] * x[4] * math.prod(weight) for (x, weight), times in found.items()
    )
    counted = json.loads(engine.WORK.read_text())["decoding a chunk"]["tflop"]
    assert 0.9 * counted < flop / 1e12 < counted


def test_convolutions_are_timed_with_the_algorithms_that_the_engine_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where no engine was made before."""
    bench, tried = engine.rehearsed(), []
    monkeypatch.setattr(
        bench, "seconds", lambda work, repeats: tried.append(torch.backends.cudnn.benchmark) or 1.0
    )
    convolutions.row(bench, (1, 2, 4, 6, 6), (3, 2, 3, 3, 3), 1, None, 1)
    assert tried == [True, True] and not torch.backends.cudnn.benchmark


def test_forwards_are_timed_over_full_caches() -> None:
    """Products of zeros take less power, so a GPU runs them at a higher clock."""
    bench, opened = engine.rehearsed(), []
    usual = bench.engine()
    usual.open = lambda batch=1, open=usual.open: opened.append(open(batch)) or opened[-1]  # type: ignore[method-assign]
    engine.forward(bench, usual, 12)
    keys, values = (getattr(opened[0], name).std().item() for name in ("cache_k", "cache_v"))
    assert keys == pytest.approx(model.KEYS, rel=0.1) and values == pytest.approx(1, rel=0.1)


def test_the_recorded_work_is_that_of_the_model() -> None:
    """Counted by PyTorch over the modules, without tensors."""
    config, work = PRESETS[engine.MODEL], json.loads(engine.WORK.read_text())
    height, width = engine.HEIGHT // 8, engine.WIDTH // 8
    tokens = height * width // 4
    with torch.device("meta"), torch.no_grad():
        backbone, decoder = CausalWanModel(config), StreamingDecoder(AutoencoderKLWan())
        latents = torch.zeros(1, 3, 16, height, width)
        e, e0 = torch.zeros(1, 1, config.dim), torch.zeros(1, 1, 6, config.dim)
        times = torch.zeros(1, 3, config.time_pairs)
        cross = torch.zeros(config.num_layers, 1, config.text_len, config.num_heads, config.head_dim)
        space = backbone.space_rope(height // 2, width // 2, torch.device("meta"))
        for window in (7, 12):
            keys = torch.zeros(1, window * tokens, config.num_heads, config.head_dim)
            with FlopCounterMode(display=False) as counter:
                backbone(
                    *(latents, e, e0, times, times, cross, cross),
                    attend=lambda layer, q, k, v, keys=keys: full_attention(q, keys, keys),
                    space=space,
                )
            flop = counter.get_total_flops()
            assert work[f"one forward, window {window}"]["tflop"] == pytest.approx(flop / 1e12, rel=1e-3)
        _, caches = decoder.decode_first(latents[:, :1])
        with FlopCounterMode(display=False) as counter:
            decoder.decode(latents, caches)
        flop = counter.get_total_flops()
        assert work["decoding a chunk"]["tflop"] == pytest.approx(flop / 1e12, rel=1e-3)
