"""One question to the three implementations that a CPU can run: torch reference, ONNX function in ONNX Runtime, and the
kernel in Triton's interpreter. The fourth, the TensorRT plugin, launches this kernel.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from swiftvideo.export.ops import dynamic_window_attention, semantic_injection
from tests.export.test_ops import run

from .interpreter import Interpreter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 5e-6, "fp16": 3e-3, "bf16": 2e-2}
LAYERS, ROWS, FRESH, HEADS, HEAD = 2, 40, 10, 2, 24

SEGMENTS = {
    "a window": [[(0, 2), (4, 6), (25, 15), (10, 3), (40, 10)]],
    "one key": [[(7, 1)]],
    "everything, across the border": [[(0, 50)]],
    "a cut frame": [[(4, 6), (13, 8), (43, 7)]],
    "two sessions": [[(40, 10)], [(1, 3), (12, 17), (42, 8)]],
}
SPANS = {
    "a whole cache": [[(30, 10)], [(20, 10)], [(20, 20)], [(4, 6)], [(30, 10), (10, 5), (4, 6)]],
    "one frame": [[(4, 6)], [], [(4, 6)], [(4, 6)], [(4, 6)]],
    "no sink": [[(30, 10)], [(20, 10)], [(20, 20)], [], [(20, 20)]],
}


def normal(generator: torch.Generator, dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def onnx_inputs(**tensors: Tensor) -> dict[str, np.ndarray]:
    """ONNX Runtime computes the values of a narrower dtype in float32."""
    return {k: (v if v.dtype == torch.int32 else v.float()).numpy() for k, v in tensors.items()}


def agree(dtype: str, *results: Tensor | np.ndarray) -> None:
    values = [torch.as_tensor(item).double() for item in results]
    for other in values[1:]:
        assert (values[0] - other).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SEGMENTS, *SPANS])
def test_all_implementations_agree(interpreter: Interpreter, case: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(11)
    if case in SEGMENTS:
        tables = SEGMENTS[case]
        batch = len(tables)
        names = ("q", "fresh_k", "fresh_v")
        tensors = {name: normal(generator, dtype, batch, FRESH, HEADS, HEAD) for name in names}
        for name in ("cache_k", "cache_v"):
            tensors[name] = normal(generator, dtype, LAYERS, batch, ROWS, HEADS, HEAD)
        segments = torch.zeros(batch, 6, 2, dtype=torch.int32)
        for item, table in enumerate(tables):
            segments[item, : len(table)] = torch.tensor(table)
        tensors["segments"] = segments
        scale = HEAD**-0.5
        reference = dynamic_window_attention(*tensors.values(), layer=1, scale=scale)
        (exported,) = run("DynamicWindowAttention", onnx_inputs(**tensors), ["o"], 4, layer=1, scale=scale)
        agree(dtype, reference, exported, interpreter.attention(*tensors.values(), 1, scale))
        return
    batch = 2
    tensors = {"cache_v": normal(generator, dtype, LAYERS, batch, ROWS, HEADS, HEAD)}
    spans = torch.zeros(batch, 5, 3, 2, dtype=torch.int32)
    for which, ranges in enumerate(SPANS[case]):
        for index, pair in enumerate(ranges):
            spans[:, which, index] = torch.tensor(pair)
    tensors["spans"] = spans
    for name in ("old_signature", "new_signature"):
        tensors[name] = normal(generator, "fp32", batch, HEADS * HEAD)
    tensors |= dict(zip(("rho", "mix"), torch.rand(2, batch, generator=generator), strict=True))
    reference = semantic_injection(*tensors.values())
    exported = run("SemanticInjection", onnx_inputs(**tensors), ["bridge", "anchor"], 5)
    kernel = interpreter.injection(*tensors.values())
    for results in zip(reference, exported, kernel, strict=True):
        agree(dtype, *results)
