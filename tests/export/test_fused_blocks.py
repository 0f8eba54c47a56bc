"""Blocks with fewer passes over memory: the same numbers, parameters and places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swiftvideo.export.fused_blocks import (
    LinearGelu,
    join_gelu,
    linear_gelu,
    linear_into,
    place_keys,
)
from swiftvideo.export.models.backbone import CausalWanModel

from . import small


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 5, 24)])
def test_it_is_a_product_and_gelu(shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(24, 40), 3 * torch.randn(shape)
    with torch.no_grad():
        exact = nn.Sequential(linear, nn.GELU(approximate="tanh")).double()(x.double())
        made = LinearGelu(linear.float())(x)
    torch.testing.assert_close(made.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_what_they_promise(dtype: torch.dtype) -> None:
    """Shapes and dtypes as announced to torch.compile; nothing is changed or returned but what they say."""
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 5, 24), (40, 24), (40,)))
    out = torch.zeros(2, 9, 5, 8, dtype=dtype)[:, 4:]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_gelu, (x, weight, bias), test_utils=checks)
    torch.library.opcheck(linear_into, (x, weight, bias, out), test_utils=checks)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_k_and_v_are_made_where_they_are_read(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last rows of a block, for every item, and nowhere else."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CausalWanModel(small.BACKBONE).eval()
    block, tokens = model.layers[1], 2 * 6
    x, e0 = torch.randn(2, 2, 6, small.BACKBONE.dim), torch.randn(2, 2, 6, small.BACKBONE.dim)
    cos, sin = torch.randn(2, 2, tokens, 1, small.BACKBONE.head_dim // 2)
    sizes = (2, tokens + 3, small.BACKBONE.num_heads, small.BACKBONE.head_dim)
    keys, values = torch.full(sizes, 7.0), torch.full(sizes, 7.0)
    with torch.no_grad():
        expected = block.qkv(x, e0, cos, sin)
        place_keys(model)
        made = block.qkv_into
        monkeypatch.setattr(block, "qkv", None)  # another way than the usual one
        if backend is not None:
            made = torch.compile(made, dynamic=False, backend=backend)
        q = made(x, e0, cos, sin, keys[:, 3:], values[:, 3:])
    for ours, theirs in zip((q, keys[:, 3:], values[:, 3:]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert bool((keys[:, :3] == 7).all()) and bool((values[:, :3] == 7).all())
    torch._dynamo.reset()


def test_parameters_keep_their_names_and_storage() -> None:
    model = CausalWanModel(small.BACKBONE)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    for _ in range(2):  # an engine after another
        join_gelu(model)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert all(isinstance(block.ffn[0], LinearGelu) for block in model.layers)
