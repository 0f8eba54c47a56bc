"""float32 arithmetic on tensors of 16 bits that several kernels of a plan read.

TensorRT casts once for all who need a tensor in float32, and where they end up in two kernels it writes the result
down, twice as large as what it is a cast of. In an exported graph these functions cast -x instead, which is exact, and
which to a compiler is another tensor: the second kernel reads the 16 bits again. `docs/performance.md` has the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x factor in float32: x of any float dtype, factor float32 that broadcasts with it."""
    return (-x).float() * -factor if _apart(x) else x.float() * factor


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y in float32: x of any float dtype, y float32 that broadcasts with it."""
    return y - (-x).float() if _apart(x) else x.float() + y


def _apart(x: Tensor) -> bool:
    return x.dtype != torch.float32 and torch.onnx.is_in_onnx_export()
