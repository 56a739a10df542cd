"""Fake kernels (shapes without data) and gradients of the operators in ``torch.ops.diffrate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffrate_ext import _build  # noqa: F401  loads the operators
from diffrate_ext.reference import TINY, wide_dtype

_ops = torch.ops.diffrate


# --- fake kernels


@torch.library.register_fake("diffrate::sort_tokens")
def _(x: Tensor, importance: Tensor, size: Tensor | None = None, prefix: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[:2]
    return (
        x.new_empty(x.shape),
        x.new_empty(shape, dtype=wide_dtype(x)),
        x.new_empty(shape, dtype=torch.int64),
    )


@torch.library.register_fake("diffrate::prune_merge")
def _(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None = None,
    prefix: int = 1,
    importance: str = "class",
    features: str = "mean",
    sizes: str = "cosine",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, channels = x.shape
    return (
        x.new_empty(images, k_m, channels),
        x.new_empty((images, k_m), dtype=wide_dtype(x)),
        x.new_empty((images, tokens), dtype=torch.int64),
    )


@torch.library.register_fake("diffrate::merge_reduce")
def _(x: Tensor, dst: Tensor, kept: int, weights: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], kept, x.shape[2])


@torch.library.register_fake("diffrate::merge_reduce_backward")
def _(grad: Tensor, dst: Tensor, weights: Tensor | None = None) -> Tensor:
    return grad.new_empty(grad.shape[0], dst.shape[1], grad.shape[2])


@torch.library.register_fake("diffrate::class_attention")
def _(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 1) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2] - prefix), dtype=wide_dtype(q))


@torch.library.register_fake("diffrate::received_attention")
def _(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 0) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2] - prefix), dtype=wide_dtype(q))


# --- gradients
# Every operator that moves features is linear in them once the order and the matching are fixed, so each gradient, and
# the gradient of each gradient, is one of merge_reduce and merge_reduce_backward.


def _sort_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, size, order = output
    ctx.mark_non_differentiable(size, order)
    ctx.save_for_backward(order)


def _sort_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    (order,) = ctx.saved_tensors
    slot = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return _ops.merge_reduce_backward(grad, slot, None), None, None, None


def _prune_merge_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    size, features, residual = inputs[4], inputs[7], inputs[9]
    _, out_size, slot = output
    ctx.mark_non_differentiable(out_size, slot)
    ctx.save_for_backward(slot, size.clamp_min(TINY) if features == "weighted" and size is not None else None)
    ctx.has_residual = residual is not None


def _prune_merge_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    slot, weights = ctx.saved_tensors
    grad_x = _ops.merge_reduce_backward(grad, slot, weights)
    return (grad_x, *[None] * 8, grad_x if ctx.has_residual else None)


def _merge_reduce_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, dst, ctx.kept, weights = inputs
    ctx.save_for_backward(dst, weights)


def _merge_reduce_gradient(ctx: Any, grad: Tensor) -> tuple:
    dst, weights = ctx.saved_tensors
    return _ops.merge_reduce_backward(grad, dst, weights), None, None, None


def _merge_reduce_backward_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, dst, weights = inputs
    ctx.kept = grad.shape[1]
    ctx.save_for_backward(dst, weights)


def _merge_reduce_backward_gradient(ctx: Any, grad: Tensor) -> tuple:
    # d out_j / d grad_i = w_j / W_i where dst_j = i: the transpose is a sum over j, which is merge_reduce
    dst, weights = ctx.saved_tensors
    return _ops.merge_reduce(grad, dst, ctx.kept, weights), None, None


torch.library.register_autograd("diffrate::sort_tokens", _sort_gradient, setup_context=_sort_context)
torch.library.register_autograd("diffrate::prune_merge", _prune_merge_gradient, setup_context=_prune_merge_context)
torch.library.register_autograd("diffrate::merge_reduce", _merge_reduce_gradient, setup_context=_merge_reduce_context)
torch.library.register_autograd(
    "diffrate::merge_reduce_backward", _merge_reduce_backward_gradient, setup_context=_merge_reduce_backward_context
)
