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

    terms = None
    if x.dtype == torch.float64:  # eager PyTorch is the reference itself: what the mean is taken off is rounded, too
        deviation = (x.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
        terms = x.abs().amax(2, keepdim=True) / deviation * norm.weight.abs()
    inputs = [x, norm.weight, norm.bias]
    assert_as_accurate_as_eager("normalized", normalized, compute, inputs, dtype=x.dtype, terms=terms)
