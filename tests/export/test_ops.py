"""The two ops: torch reference and ONNX local function in ONNX Runtime, both against float64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from swiftvideo.export import onnx_ops
from swiftvideo.export.ops import dynamic_window_attention, semantic_injection
from swiftvideo.runtime.errors import UsageError

Array = NDArray[Any]
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT32


def run(
    op: str, inputs: dict[str, Array], outputs: Sequence[str], rank: int, **attributes: Any
) -> list[Array]:
    """The op's local function in ONNX Runtime; `outputs` are of this rank."""
    node = helper.make_node(op, list(inputs), list(outputs), domain=onnx_ops.DOMAIN, **attributes)
    kinds = {np.dtype(np.float32): FLOAT, np.dtype(np.int32): INT}
    given = [
        helper.make_tensor_value_info(name, kinds[value.dtype], [None] * value.ndim)
        for name, value in inputs.items()
    ]
    made = [helper.make_tensor_value_info(name, FLOAT, [None] * rank) for name in outputs]
    opsets = [helper.make_opsetid("", onnx_ops.OPSET), helper.make_opsetid(onnx_ops.DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], op, given, made), opset_imports=opsets, ir_version=10)
    onnx_ops.attach(model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(list(outputs), inputs)
    return results


def rows_of(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [row for start, length in ranges for row in range(start, start + length)]


def attention64(q: Array, k: Array, v: Array, rows: list[int], scale: float) -> Array:
    """One item: q [N,n,d], k and v [rows,n,d]."""
    scores = np.einsum("ihd,jhd->hij", q.astype(np.float64), k[rows].astype(np.float64)) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v[rows].astype(np.float64))


# (cache rows, fresh rows, size of the queries, per item: segments)
R, N = 37, 9
ATTENTION = {
    "fresh rows only": (1.0, [[(R, N)]]),
    "everything": (1.0, [[(0, R + N)]]),
    "six pieces": (1.0, [[(0, 2), (3, 1), (6, 7), (30, 7), (13, 4), (R, N)]]),
    "frames cut in the middle": (1.0, [[(6, 5), (15, 11), (R + 4, N - 4)]]),
    "one key": (1.0, [[(20, 1)]]),
    "one fresh key": (1.0, [[(R + N - 1, 1)]]),
    "huge logits": (300.0, [[(2, 20), (R, N)]]),
    "two sessions": (1.0, [[(R, N)], [(1, 3), (12, 17), (R + 2, N - 2)]]),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str) -> None:
    size, tables = ATTENTION[case]
    rng, batch, layers, heads, width = np.random.default_rng(0), len(tables), 3, 2, 7
    fresh, cached = (batch, N, heads, width), (layers, batch, R, heads, width)
    q, fresh_k, fresh_v = (rng.standard_normal(fresh, np.float32) for _ in range(3))
    cache_k, cache_v = (rng.standard_normal(cached, np.float32) for _ in range(2))
    q *= np.float32(size)
    segments = np.zeros((batch, 6, 2), np.int32)
    for item, table in enumerate(tables):
        segments[item, : len(table)] = table
    inputs = {"q": q, "fresh_k": fresh_k, "fresh_v": fresh_v, "cache_k": cache_k, "cache_v": cache_v}
    inputs["segments"] = segments
    layer, scale = 1, 0.3
    expected = np.stack(
        [
            attention64(
                q[item],
                np.concatenate((cache_k[layer, item], fresh_k[item])),
                np.concatenate((cache_v[layer, item], fresh_v[item])),
                rows_of(table),
                scale,
            )
            for item, table in enumerate(tables)
        ]
    )
    tensors = (torch.from_numpy(value) for value in inputs.values())
    ours = dynamic_window_attention(*tensors, layer=layer, scale=scale).numpy()
    (exported,) = run("DynamicWindowAttention", inputs, ["o"], 4, layer=layer, scale=scale)
    tolerance = 1e-5 if size == 1 else 2e-3  # float32 logits of a thousand are good to 1e-4
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(exported, expected, rtol=0, atol=tolerance)


def test_attention_needs_a_key() -> None:
    q, cache = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 3, 1, 4)
    with pytest.raises(UsageError, match="item 0 list no row"):
        dynamic_window_attention(q, q, q, cache, cache, torch.zeros(1, 6, 2, dtype=torch.int32), 0, 0.5)


def injection64(
    v: Array, spans: list[list[tuple[int, int]]], old: Array, new: Array, rho: float, mix: float
) -> tuple[Array, Array]:
    """algorithm.md, sections 5 and 6, for one layer of one item: v [R,n,d], signatures [n*d]."""
    v, heads = v.astype(np.float64), v.shape[1:]
    last, before, recent, sink, tail = (v[rows_of(span)].mean(0) if rows_of(span) else None for span in spans)
    old, new = old.astype(np.float64).reshape(heads), new.astype(np.float64).reshape(heads)
    delta = new - old
    if before is not None:
        mu = last - before
        for head in range(heads[0]):
            square = mu[head] @ mu[head]
            if square > 1e-6:
                delta[head] -= delta[head] @ mu[head] / (square + 1e-6) * mu[head]
    bridge = []
    for base in (recent if sink is None else sink, recent):
        floors = [np.maximum(np.linalg.norm(x, axis=-1), 1e-6) for x in (base, delta)]
        gate = (rho * np.clip((base * delta).sum(-1) / (floors[0] * floors[1]), 0, 1))[:, None]
        bridge.append((1 - gate) * base + gate * delta)
    return np.stack(bridge), ((1 - mix) * tail + mix * old)[None]


SINK, NEWEST = (6, 8), (33, 4)
SPANS = {
    "many frames": [[[NEWEST], [(29, 4)], [(29, 8)], [SINK], [(30, 3), (14, 5), (33, 4)]]],
    "spans in pieces": [[[(36, 1), (14, 3)], [(32, 4)], [(32, 5), (14, 3)], [SINK], [(20, 17), (14, 3)]]],
    "one frame": [[[(6, 4)], [], [(6, 4)], [(6, 4)], [(6, 4)]]],
    "no sink": [[[NEWEST], [(29, 4)], [(29, 8)], [], [(20, 17)]]],
    "frames without motion": [[[NEWEST], [NEWEST], [NEWEST], [SINK], [(20, 17)]]],
    "next to no motion": [[[(36, 1)], [(35, 1)], [NEWEST], [SINK], [NEWEST]]],
    "the same prompt": [[[NEWEST], [], [(29, 8)], [SINK], [(20, 17)]]],
    "one row each": [[[(36, 1)], [(35, 1)], [(36, 1)], [(6, 1)], [(36, 1)]]],
    "two sessions": [
        [[NEWEST], [(29, 4)], [(29, 8)], [SINK], [(20, 17)]],
        [[(6, 4)], [], [(6, 4)], [], [(6, 4)]],
    ],
}


@pytest.mark.parametrize("case", SPANS)
def test_injection(case: str) -> None:
    tables = SPANS[case]
    rng, batch, layers, heads, width = np.random.default_rng(1), len(tables), 3, 2, 5
    cache_v = rng.standard_normal((layers, batch, R, heads, width), np.float32)
    spans = np.zeros((batch, 5, 3, 2), np.int32)
    for item, ranges in enumerate(tables):
        for index, pieces in enumerate(ranges):
            spans[item, index, : len(pieces)] = np.array(pieces, np.int32).reshape(-1, 2)
    old, new = (rng.standard_normal((batch, heads * width), np.float32) for _ in range(2))
    rho, mix = (rng.random(batch, np.float32) for _ in range(2))
    if case == "next to no motion":
        cache_v[:, :, 36] = cache_v[:, :, 35] + np.float32(3e-4)
    if case == "the same prompt":
        new = old.copy()
    inputs = {"cache_v": cache_v, "spans": spans, "old_signature": old, "new_signature": new}
    inputs |= {"rho": rho, "mix": mix}
    ours = semantic_injection(*(torch.from_numpy(value) for value in inputs.values()))
    exported = run("SemanticInjection", inputs, ["bridge", "anchor"], 5)
    for layer in range(layers):
        for item in range(batch):
            expected = injection64(
                cache_v[layer, item],
                tables[item],
                old[item],
                new[item],
                float(rho[item]),
                float(mix[item]),
            )
            for theirs, torchs, onnxs in zip(expected, ours, exported, strict=True):
                np.testing.assert_allclose(torchs[layer, item].numpy(), theirs, rtol=0, atol=1e-5)
                np.testing.assert_allclose(onnxs[layer, item], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("absent", [0, 2, 4])
def test_injection_needs_a_cache(absent: int) -> None:
    spans = torch.zeros(1, 5, 3, 2, dtype=torch.int32)
    spans[:, [0, 2, 4], 0, 1] = 1
    spans[:, absent] = 0
    with pytest.raises(UsageError, match="the first, third and fifth must list rows, for an empty cache"):
        semantic_injection(torch.zeros(1, 1, 4, 1, 4), spans, *torch.zeros(2, 1, 4), *torch.zeros(2, 1))
