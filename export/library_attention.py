"""torch's own attentions, called by name: which one runs is ours to say, and no setting of the process is touched.

`torch.nn.attention.sdpa_kernel` would switch backends for all threads, and choose by rules instead of by trying.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q [B,n,N,d], k [B,n,K,d], v [B,n,K,d], scale) -> [B,n,N,d]."""


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    o: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]
    return o


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    o: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    return o


LIBRARY: dict[str, Attention] = {"cudnn": _cudnn, "flash": _flash}


def library_attention(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of every query to every key: q [B,N,n,d], k, v [B,K,n,d] -> [B,N,n,d].

    name: of `LIBRARY`; on the CPU, for rehearsals, torch's attention there, whatever the name.
    Raises RuntimeError where this GPU, dtype or head width has no such attention.
    """
    heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cuda":
        o = LIBRARY[name](*heads, scale)
    else:
        o = functional.scaled_dot_product_attention(*heads, scale=scale)
    return o.transpose(1, 2)


def passing(error: RuntimeError) -> bool:
    """Whether an attention that is missing or refuses raised it; not memory that is, or a GPU that failed."""
    return not isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
