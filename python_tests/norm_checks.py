"""What tests of layer normalization share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_eager
from torch import Tensor

from diffrate_ext import ops


def norm_of(
    channels: int, dtype: torch.dtype, device: torch.device, *, bias: bool = True, eps: float = 1e-6
) -> ops.Norm:
    weight, shift = torch.randn(2, channels, generator=torch.Generator().manual_seed(channels)).to(device, dtype)
    return ops.Norm(weight, shift if bias else None, eps)


def check_normalized(normalized: Tensor, x: Tensor, norm: ops.Norm) -> None:
    assert normalized.is_contiguous()

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, norm.eps)

    assert_as_accurate_as_eager("normalized", normalized, compute, [x, norm.weight, norm.bias], dtype=x.dtype)
