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


@torch.library.register_fake("diffrate::proportional_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float, prefix: int = 1, importance: str = "class"
) -> tuple[Tensor, Tensor]:
    patches = 0 if importance == "none" else q.shape[2] - prefix
    return _empty_heads(q), q.new_empty((q.shape[0], patches), dtype=wide_dtype(q))


@torch.library.register_fake("diffrate::masked_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None,
    scale: float,
    prefix: int = 1,
    importance: str = "class",
) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty((q.shape[0], q.shape[2] - prefix), dtype=wide_dtype(q))


@torch.library.register_fake("diffrate::masked_attention_backward")
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(q), _empty_heads(q), mask.new_empty(mask.shape)


def _empty_heads(q: Tensor) -> Tensor:
    """(B, H, N, D) over (B, N, H, D) memory."""
    images, heads, tokens, channels = q.shape
    return q.new_empty(images, tokens, heads, channels).transpose(1, 2)


@torch.library.register_fake("diffrate::compression_rate")
def _(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0], n_patches + prefix)


@torch.library.register_fake("diffrate::compression_rate_backward")
def _(
    grad_kept: Tensor, grad_keep_prob: Tensor, logits: Tensor, n_patches: int, granularity: int, prefix: int
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("diffrate::masked_prune_merge")
def _(
    x: Tensor,
    mask: Tensor,
    importance: Tensor,
    size: Tensor | None,
    prune_prob: Tensor,
    merge_prob: Tensor,
    kept_p: Tensor,
    kept_m: Tensor,
    prefix: int = 1,
    sizes: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, wide = x.shape[:2], wide_dtype(x)
    positions = (x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.int64))
    return x.new_empty(x.shape), x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide), *positions


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


def _masked_attention_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, size, ctx.scale, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, mask, size)


def _masked_attention_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    gradients = _ops.masked_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None, None)


def _compression_rate_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ctx.n_patches, ctx.granularity, ctx.prefix = inputs
    ctx.save_for_backward(logits)


def _compression_rate_gradient(ctx: Any, grad_kept: Tensor, grad_keep_prob: Tensor) -> tuple:
    (logits,) = ctx.saved_tensors
    gradient = _ops.compression_rate_backward(
        grad_kept, grad_keep_prob, logits, ctx.n_patches, ctx.granularity, ctx.prefix
    )
    return gradient, None, None, None


def _masked_prune_merge_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    mask, prune_prob, merge_prob, kept_p, kept_m = inputs[1], *inputs[4:8]
    _, _, size, order, dst = output
    ctx.mark_non_differentiable(size, order, dst)
    ctx.save_for_backward(mask, prune_prob, merge_prob, kept_p, kept_m, order, dst)


def _masked_prune_merge_gradient(ctx: Any, grad_x: Tensor, grad_mask: Tensor, *_: Tensor) -> tuple:
    mask, prune_prob, merge_prob, kept_p, kept_m, order, dst = ctx.saved_tensors
    position = torch.arange(order.shape[1], device=order.device)
    # a destination's gradient goes to all that merged into it; a source stays in place besides
    stays = torch.where(dst == position, -1, position.expand_as(dst))
    unsorted = torch.empty_like(order)
    slot = unsorted.scatter(1, order, dst)
    gradient = _ops.merge_reduce_backward(grad_x, slot, None)
    gradient = gradient + _ops.merge_reduce_backward(grad_x, unsorted.scatter(1, order, stays), None)

    alive = mask.gather(1, order)
    last = alive[:1].detach().sum()  # of the first image, as of every other
    middle = torch.minimum(last, kept_p)
    prunes, merges = (kept_p < last).to(alive.dtype), (kept_m < middle).to(alive.dtype)

    def shown(kept: Tensor, end: Tensor, probability: Tensor, acts: Tensor) -> Tensor:
        """0 at positions kept .. end-1, 1 elsewhere; like the probability when it is differentiated once more."""
        hard = ((position < kept.round()) | (position >= end)).to(alive.dtype)
        return hard + acts * (probability - probability.detach())

    by_pruning = shown(kept_p, last, prune_prob, prunes)
    by_merging = shown(kept_m, middle, merge_prob, merges)
    sorted_mask = grad_mask * by_pruning * by_merging
    to_prune = (grad_mask * alive * by_merging).sum(0) * prunes
    to_merge = (grad_mask * alive * by_pruning).sum(0) * merges
    return (
        gradient,
        torch.empty_like(sorted_mask).scatter(1, order, sorted_mask),
        None,
        None,
        to_prune,
        to_merge,
        *[None] * 4,
    )


def _refuse_gradient(name: str, message: str) -> None:
    """Where a formula is missing, a gradient raises, instead of being zero."""

    def refuse(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(message)

    torch.library.register_autograd(f"diffrate::{name}", refuse, setup_context=lambda ctx, inputs, output: None)


torch.library.register_autograd("diffrate::sort_tokens", _sort_gradient, setup_context=_sort_context)
torch.library.register_autograd("diffrate::prune_merge", _prune_merge_gradient, setup_context=_prune_merge_context)
torch.library.register_autograd("diffrate::merge_reduce", _merge_reduce_gradient, setup_context=_merge_reduce_context)
torch.library.register_autograd(
    "diffrate::merge_reduce_backward", _merge_reduce_backward_gradient, setup_context=_merge_reduce_backward_context
)
torch.library.register_autograd(
    "diffrate::masked_attention", _masked_attention_gradient, setup_context=_masked_attention_context
)
torch.library.register_autograd(
    "diffrate::compression_rate", _compression_rate_gradient, setup_context=_compression_rate_context
)
torch.library.register_autograd(
    "diffrate::masked_prune_merge", _masked_prune_merge_gradient, setup_context=_masked_prune_merge_context
)
_refuse_gradient("masked_attention_backward", "masked_attention cannot be differentiated twice")
_refuse_gradient("compression_rate_backward", "compression_rate cannot be differentiated twice")
_refuse_gradient(
    "proportional_attention",
    "torch.ops.diffrate.proportional_attention has no gradient; diffrate_ext.ops.proportional_attention has",
)
