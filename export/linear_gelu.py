"""A product and its GELU in one pass, for a GPU: cuBLASLt applies GELU to what it has in registers.

A GELU of its own reads and writes the widest tensor of a block once more. `torch.compile` takes the call for that apart
into product and GELU, so it is in an operator that it does not look into.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .models.backbone import CausalWanModel


@torch.library.custom_op("swiftvideo::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, by tanh, of x weight^T + bias: x [...,i], weight [o,i], bias [o] -> [...,o]."""
    if x.device.type != "cuda":  # rehearsals: the CPU's epilogue is GELU by erf
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    rows = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return torch.unflatten(rows, 0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class LinearGelu(nn.Module):
    """`linear` and GELU, with its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [...,i] -> [...,o]."""
        return linear_gelu(x, self.weight, self.bias)


def join_gelu(model: CausalWanModel) -> None:
    """Let every block's feed-forward network begin with a `LinearGelu`, in place; parameters keep their names."""
    for block in model.layers:
        first, _, last = block.ffn
        if isinstance(first, nn.Linear):  # else it is joined already
            block.ffn = nn.Sequential(LinearGelu(first), nn.Identity(), last)
