from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import refuse_gradient
from ._call import REFUSED, call, needs_gradient
from ._checks import check_like, check_shape, check_tensor
from ._norm import Norm, check_norm, is_plain


class AddedTokens(NamedTuple):
    """What :func:`add_norm` returns."""

    x: Tensor
    normalized: Tensor


def add_norm(x: Tensor, residual: Tensor, norm: Norm) -> AddedTokens:
    """The sum of two tensors and its layer normalization, in one pass: what lies between two blocks.

    Args:
        x: features (B, N, C); any strides.
        residual: (B, N, C), added to x. Where dtypes differ, the sum has the wider one, as in PyTorch.
        norm: its weight and bias have the dtype of the sum.

    Returns:
        x, the sum, and normalized, both (B, N, C) and of the dtype of the sum. Gradients reach x, residual, and the
        norm's weight and bias.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device.
    """
    refused: Exception | None = None
    try:
        if is_plain(norm) and residual.dtype == x.dtype:
            return _run(x, residual, norm)
    except REFUSED as error:
        refused = error
    x, residual = _check(x, residual, norm)
    if refused is not None:
        raise refused
    return _run(x, residual, norm)


def _run(x: Tensor, residual: Tensor, norm: Norm) -> AddedTokens:
    if not needs_gradient(x, residual, *norm[:2]):
        return AddedTokens(*call(torch.ops.diffrate.add_norm.default, (x, residual, *norm)))
    x, residual = _check(x, residual, norm)
    x = x + residual
    return AddedTokens(x, F.layer_norm(x, x.shape[2:], *norm).to(x.dtype))  # under autocast it is float32


def _check(x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """What is added, of one dtype."""
    check_tensor("x", x, 3, "(B, N, C)")
    check_tensor("residual", residual, 3, "(B, N, C)")
    check_shape("residual", residual, x.shape, "the shape of x")
    check_like("residual", residual, "x", x, dtype=False)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    check_norm(norm, x)
    return x, residual


@torch.library.register_fake("diffrate::add_norm")
def _(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor]:
    _check(x, residual, Norm(norm_weight, norm_bias, norm_eps))
    return x.new_empty(x.shape), x.new_empty(x.shape)


refuse_gradient("add_norm", "torch.ops.diffrate.add_norm has no gradient: diffrate_ext.ops.add_norm has one")
