"""The backbone's blocks with fewer passes over a GPU's memory; parameters and numbers stay what they are.

- `linear_gelu`: cuBLASLt applies GELU to what a product has in registers. A GELU of its own reads and writes the widest
  tensor of a block once more.
- `qkv_into`: K and V of a chunk are made where its attention reads them. Written as here, Inductor makes one kernel of
  both norms, both rotations and the writing of K; V is written by its product.

`torch.compile` takes calls of `torch._addmm_activation` and of products with `out` apart, so both are in operators that
it does not look into.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from .models.backbone import Block, CausalWanModel, modulated


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


@torch.library.custom_op("swiftvideo::linear_into", mutates_args=("out",))
def linear_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """x weight^T + bias into `out`: x [B,N,i], weight [n*d,i], bias [n*d], out [B,N,n,d], dense within an item."""
    for rows, place in zip(x, out, strict=True):
        torch.addmm(bias, rows, weight.t(), out=place.view(len(rows), -1))


@linear_into.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    return None


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


def qkv_into(
    block: Block, x: Tensor, e0: Tensor, cos: Tensor, sin: Tensor, k_out: Tensor, v_out: Tensor
) -> Tensor:
    """`Block.qkv_into`."""
    attention, shift, scale = block.self_attn, *block.modulations(e0)[:2]
    y = modulated(x, shift, scale, block.eps).flatten(1, 2)
    k_out.copy_(_rotated(attention.key(y), cos, sin).to(x.dtype))
    linear_into(y, attention.v.weight, attention.v.bias, v_out)
    return _rotated(attention.query(y), cos, sin).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` by swapping the pairs, which ONNX Runtime is slow at and Inductor fuses with what is around it."""
    pairs = torch.unflatten(x, -1, (-1, 2))
    signs = 2 * torch.arange(2, device=x.device) - 1
    return (pairs * cos.unsqueeze(-1) + pairs.flip(-1) * (signs * sin.unsqueeze(-1))).flatten(-2)


def place_keys(model: CausalWanModel) -> None:
    """Let every block make K and V of a chunk in their places, in place."""
    for block in model.layers:
        block.qkv_into = MethodType(qkv_into, block)  # type: ignore[method-assign]
