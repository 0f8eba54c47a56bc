"""GELU as a part of its product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swiftvideo.export.linear_gelu import LinearGelu, join_gelu, linear_gelu
from swiftvideo.export.models.backbone import CausalWanModel

from . import small


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 5, 24)])
def test_it_is_a_product_and_gelu(shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(24, 40), 3 * torch.randn(shape)
    with torch.no_grad():
        exact = nn.Sequential(linear, nn.GELU(approximate="tanh")).double()(x.double())
        made = LinearGelu(linear.float())(x)
    torch.testing.assert_close(made.double(), exact, atol=1e-5, rtol=1e-5)


def test_the_operator_keeps_what_it_promises() -> None:
    """Shapes and dtypes as announced to torch.compile, no input changed, none returned."""
    given = torch.randn(2, 5, 24), torch.randn(40, 24), torch.randn(40)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            linear_gelu,
            tuple(value.to(dtype) for value in given),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_parameters_keep_their_names_and_storage() -> None:
    model = CausalWanModel(small.BACKBONE)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    for _ in range(2):  # an engine after another
        join_gelu(model)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert all(isinstance(block.ffn[0], LinearGelu) for block in model.layers)
