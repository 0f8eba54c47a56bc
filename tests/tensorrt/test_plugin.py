"""The plugins' own code: what they tell TensorRT, and what they launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swiftvideo.runtime.errors import EngineError, SettingsError
from swiftvideo.runtime.plugins import tensorrt as plugins
from swiftvideo.runtime.plugins.kernel import ATTENTION, INJECTION, Kernel
from swiftvideo.runtime.plugins.launch import Launcher

from .driver import FakeDriver

LAYERS, BATCH, ROWS, QUERIES, HEADS, HEAD = 3, 1, 50, 21, 2, 24


@pytest.fixture(scope="module")
def kernels(rtx: None) -> dict[str, Kernel]:
    from swiftvideo.export.kernels.compiler import compile_kernel

    return {op: compile_kernel(op, 89, "fp32", HEAD).kernel for op in (ATTENTION, INJECTION)}


@pytest.fixture
def trt(rtx: None) -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings")


def described(*shape: int) -> Any:
    return SimpleNamespace(dims=shape)


def created(trt: Any, kernels: dict[str, Kernel] | None, op: str, phase: str, fields: list[Any]) -> Any:
    creators = {creator.name: creator for creator in plugins.register(trt, kernels)}
    collection = fields if phase == "RUNTIME" else trt.PluginFieldCollection(fields)
    return creators[op].create_plugin("a node", collection, getattr(trt.TensorRTPhase, phase))


def attributes(trt: Any, layer: int, scale: float) -> list[Any]:
    return [
        trt.PluginField("layer", np.array([layer], np.int32), trt.PluginFieldType.INT32),
        trt.PluginField("scale", np.array([scale], np.float32), trt.PluginFieldType.FLOAT32),
    ]


def launched(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(plugins, "Launcher", lambda kernel: Launcher(kernel, driver))
    return driver


def test_attention_launches_its_kernel(
    trt: Any, kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = launched(monkeypatch)
    plugin = created(trt, kernels, ATTENTION, "BUILD", attributes(trt, 2, 0.125))
    loaded = created(trt, None, ATTENTION, "RUNTIME", plugin.get_fields_to_serialize())
    fresh, cache = described(BATCH, QUERIES, HEADS, HEAD), described(LAYERS, BATCH, ROWS, HEADS, HEAD)
    inputs = [fresh, fresh, fresh, cache, cache, described(BATCH, 6, 2)]
    attached = loaded.attach_to_context(None)  # kept: the recorded launch points into it
    attached.enqueue(inputs, [fresh], range(100, 106), [106], 107, 9)
    (call,) = driver.launches
    tiles = HEADS * BATCH
    spec, scalars = kernels[ATTENTION].spec, (2, 0.125, BATCH, HEADS, QUERIES, ROWS, tiles, 1, 0)
    assert dict(zip((name for name, _ in spec.arguments), call.values(spec), strict=True)) == {
        **dict(
            zip(
                ("q", "fresh_k", "fresh_v", "cache_k", "cache_v", "segments", "o", "partial"),
                range(100, 108),
                strict=True,
            )
        ),
        **dict(
            zip(
                ("layer", "scale", "batch", "heads", "queries", "rows", "unsplit", "pieces", "merging"),
                scalars,
                strict=True,
            )
        ),
    }
    assert call.cubin == kernels[ATTENTION].cubin and call.stream == 9
    assert call.grid == (tiles, 1, 1)


def test_tiles_that_would_leave_the_gpu_idle_are_split(
    trt: Any, kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches then, of one graph or of none; the workspace that was asked for has room for the pieces."""
    driver, values = launched(monkeypatch), []
    spec = kernels[ATTENTION].spec
    driver.on_launch = lambda call: values.append(call.values(spec)[-3:])
    plugin = created(trt, kernels, ATTENTION, "BUILD", attributes(trt, 0, 1.0)).attach_to_context(None)
    slots = Launcher(kernels[ATTENTION], driver).slots()
    queries, rows = (slots + 1) * spec.tile[0], 9999
    fresh, cache = described(1, queries, 1, HEAD), described(LAYERS, 1, rows, 1, HEAD)
    inputs = [fresh, fresh, fresh, cache, cache, described(1, 6, 2)]
    plugin.enqueue(inputs, [fresh], range(6), [6], 7, 9)
    pieces = values[0][1]
    assert pieces > 1 and values == [(slots, pieces, 0), (slots, pieces, 1)]
    merging = spec.tile[0] // spec.tile[3]
    assert [call.grid for call in driver.launches] == [(slots + pieces, 1, 1), (merging, 1, 1)]
    assert plugin.get_workspace_size([], []) >= pieces * spec.tile[0] * (spec.tile[2] + 2) * 4
    injection = created(trt, kernels, INJECTION, "BUILD", [])
    assert injection.get_workspace_size([], []) == 0


def test_injection_launches_its_kernel(
    trt: Any, kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = launched(monkeypatch)
    plugin = created(trt, kernels, INJECTION, "BUILD", [])
    loaded = created(trt, None, INJECTION, "RUNTIME", plugin.get_fields_to_serialize())
    inputs = [described(LAYERS, BATCH, ROWS, HEADS, HEAD), *[described(1)] * 5]
    loaded.enqueue(inputs, [], range(200, 206), [206, 207], 0, 9)
    (call,) = driver.launches
    spec = kernels[INJECTION].spec
    names = ("cache_v", "spans", "old_signature", "new_signature", "rho", "mix", "bridge", "anchor")
    assert dict(zip((name for name, _ in spec.arguments), call.values(spec), strict=True)) == {
        **dict(zip(names, range(200, 208), strict=True)),
        "batch": BATCH,
        "heads": HEADS,
        "rows": ROWS,
    }
    assert call.grid == (HEADS, BATCH, LAYERS)


def test_a_launch_that_fails_is_an_exception_with_cuda_s_code(
    trt: Any, kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = launched(monkeypatch)
    driver.launch_code = 1
    plugin = created(trt, kernels, INJECTION, "BUILD", [])
    inputs = [described(LAYERS, BATCH, ROWS, HEADS, HEAD), *[described(1)] * 5]
    with pytest.raises(EngineError, match=r"CUDA_ERROR_INVALID_VALUE \(1\)"):
        plugin.enqueue(inputs, [], range(6), [6, 7], 0, 9)


def test_formats(trt: Any, kernels: dict[str, Kernel]) -> None:
    plugin = created(trt, kernels, ATTENTION, "BUILD", attributes(trt, 0, 1.0))

    def accepts(place: int, kind: Any, layout: Any = trt.TensorFormat.LINEAR) -> bool:
        descriptions = [SimpleNamespace(desc=SimpleNamespace(type=kind, format=layout))] * 7
        return bool(plugin.supports_format_combination(place, descriptions, 6))

    for place in (0, 1, 4, 6):
        assert accepts(place, trt.DataType.FLOAT)
        assert not accepts(place, trt.DataType.HALF)
        assert not accepts(place, trt.DataType.FLOAT, trt.TensorFormat.CHW4)
    assert accepts(5, trt.DataType.INT32) and not accepts(5, trt.DataType.FLOAT)


def test_building_needs_kernels_and_a_positive_scale(trt: Any, kernels: dict[str, Kernel]) -> None:
    with pytest.raises(EngineError, match="no kernel of DynamicWindowAttention is registered"):
        created(trt, None, ATTENTION, "BUILD", attributes(trt, 0, 1.0))
    with pytest.raises(SettingsError, match=r"scale -1\.0: the kernel needs a positive one"):
        created(trt, kernels, ATTENTION, "BUILD", attributes(trt, 0, -1.0))
    plugin = created(trt, kernels, ATTENTION, "BUILD", attributes(trt, 0, 1.0))
    wrong = SimpleNamespace(desc=SimpleNamespace(dims=(1, 2, 3, 32)))
    with pytest.raises(SettingsError, match="heads of 32 and its kernel is for 24"):
        plugin.configure_plugin([wrong], [])
