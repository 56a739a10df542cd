from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputTypeError, InputValueError
from ._autograd import register_gradient, with_gradient
from ._checks import check_int, check_like, check_range, check_residual, check_shape, check_tensor, check_wide_vector


def merge_reduce(
    x: Tensor, dst: Tensor, kept: int, *, weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Mean of the tokens that share a destination: a scatter-mean in one pass, with its gradient.

    Args:
        x: features (B, N, C); any strides.
        dst: output position of each token, (B, N) int64, in ``-1 .. kept-1``; -1 goes nowhere.
        kept: number of output tokens.
        weights: (B, N), for a weighted mean; None stands for ones. A constant: no gradient reaches it.
        residual: (B, N, C), added to x on the way in.

    Returns:
        (B, kept, C). A position without tokens, or whose weights sum to zero, is zero.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device, or ``dst`` is out of range. On
            CUDA tokens out of range go nowhere instead: looking would stop the stream.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    if residual is not None:
        x, residual = check_residual(residual, x)
    kept = check_int("kept", kept, 0)
    if not isinstance(dst, Tensor):
        raise InputTypeError(f"dst must be a tensor (B, N), got {type(dst).__name__}")
    if dst.dtype != torch.int64:
        raise InputTypeError(f"dst must be int64, got {dst.dtype}")
    check_shape("dst", dst, x.shape[:2], "(B, N)")
    check_like("dst", dst, "x", x, dtype=False)
    if weights is not None:
        weights = check_wide_vector("weights", weights, x, "x", (x.shape[0], x.shape[1]))
        if weights.requires_grad:
            raise InputValueError(
                "weights must not require a gradient (merge_reduce treats them as constants): detach them"
            )
    check_range("dst", dst, kept)
    return with_gradient(torch.ops.diffrate.merge_reduce.default, x, dst, kept, weights, residual)


@torch.library.register_fake("diffrate::merge_reduce")
def _(x: Tensor, dst: Tensor, kept: int, weights: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], kept, x.shape[2])


@torch.library.register_fake("diffrate::merge_reduce_backward")
def _(grad: Tensor, dst: Tensor, weights: Tensor | None = None) -> Tensor:
    return grad.new_empty(grad.shape[0], dst.shape[1], grad.shape[2])


# Each is the gradient of the other, so that gradients of any order are right. The gradients of sort_tokens and
# prune_merge are made of these two.


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, dst, ctx.kept, weights, residual = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(dst, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    dst, weights = ctx.saved_tensors
    grad_x = with_gradient(torch.ops.diffrate.merge_reduce_backward.default, grad, dst, weights)
    return grad_x, None, None, None, grad_x if ctx.has_residual else None


def _setup_backward_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, dst, weights = inputs
    ctx.kept = grad.shape[1]
    ctx.save_for_backward(dst, weights)


def _double_backward(ctx: Any, grad: Tensor) -> tuple:
    # d out_j / d grad_i = w_j / W_i where dst_j = i: the transpose is a sum over j, which is merge_reduce
    dst, weights = ctx.saved_tensors
    return with_gradient(torch.ops.diffrate.merge_reduce.default, grad, dst, ctx.kept, weights, None), None, None


register_gradient("merge_reduce", _backward, _setup_context)
register_gradient("merge_reduce_backward", _double_backward, _setup_backward_context)
