from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from swiftvideo.export.models.casts import added, scaled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_exported_has_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.randn(64, 32) * 10, torch.tensor([[0.0, -0.0, 1e-7, 6e4]]).tile(1, 8))).to(dtype)
    factor, y = torch.rand(65, 1) + 0.1, torch.randn(65, 32)
    plain = scaled(x, factor), added(x, y)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = scaled(x, factor), added(x, y)
    for a, b in zip(plain, exported, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert torch.equal(plain[0], x.float() * factor) and torch.equal(plain[1], x.float() + y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exporting", [True, False])
@pytest.mark.parametrize("function", [scaled, added])
def test_only_in_a_graph_of_16_bits_what_is_cast_is_minus_x(
    function: Callable[[Tensor, Tensor], Tensor],
    exporting: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: exporting)
    nodes = make_fx(function)(torch.ones(2, dtype=dtype), torch.ones(2)).graph.nodes
    negated = {node.target for node in nodes} & {torch.ops.aten.neg.default}
    assert bool(negated) == (exporting and dtype != torch.float32)
