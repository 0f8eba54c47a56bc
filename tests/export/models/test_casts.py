from __future__ import annotations

import pytest
import torch

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
