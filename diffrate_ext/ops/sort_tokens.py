from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numeric import wide_dtype
from ._autograd import register_gradient, with_gradient
from ._checks import check_importance, check_prefix, check_tensor, check_wide_vector


class SortedTokens(NamedTuple):
    """What :func:`sort_tokens` returns."""

    x: Tensor
    size: Tensor
    order: Tensor


def sort_tokens(x: Tensor, importance: Tensor, size: Tensor | None = None, *, prefix: int = 1) -> SortedTokens:
    """Sort tokens by descending importance, in one pass (token sorting, section 3 of the paper).

    Prefix tokens stay first. Ties keep their order, NaN importance comes last.

    Args:
        x: features (B, N, C); any strides.
        importance: (B, N-P) of the patches, or (B, N), of which the prefix is ignored. Not differentiable.
        size: token sizes (B, N); None stands for ones.
        prefix: P.

    Returns:
        x (B, N, C) and size (B, N) in sorted order, and order (B, N) int64: the input position of each sorted position.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device, or P is not in ``0 .. N``.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    prefix = check_prefix(prefix, x.shape[1])
    importance = check_importance("importance", importance, x, prefix)
    if size is not None:
        size = check_wide_vector("size", size, x, "x", (x.shape[0], x.shape[1]))
    return SortedTokens(*with_gradient(torch.ops.diffrate.sort_tokens.default, x, importance, size, prefix))


@torch.library.register_fake("diffrate::sort_tokens")
def _(x: Tensor, importance: Tensor, size: Tensor | None = None, prefix: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[:2]
    return (
        x.new_empty(x.shape),
        x.new_empty(shape, dtype=wide_dtype(x)),
        x.new_empty(shape, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, size, order = output
    ctx.mark_non_differentiable(size, order)
    ctx.save_for_backward(order)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    (order,) = ctx.saved_tensors
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    slot = torch.empty_like(order).scatter_(1, order, position)
    return with_gradient(torch.ops.diffrate.merge_reduce_backward.default, grad, slot, None), None, None, None


register_gradient("sort_tokens", _backward, _setup_context)
