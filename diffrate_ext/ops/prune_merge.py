from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputValueError
from ..numeric import TINY, wide_dtype
from ._checks import (
    check_choice,
    check_importance,
    check_int,
    check_like,
    check_prefix,
    check_shape,
    check_tensor,
    check_wide_vector,
    constant,
)


class MergedTokens(NamedTuple):
    """What :func:`prune_merge` returns."""

    x: Tensor
    size: Tensor
    slot: Tensor


def prune_merge(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None = None,
    *,
    prefix: int = 1,
    importance_from: Literal["class", "received"] = "class",
    mean_rule: Literal["mean", "weighted"] = "mean",
    size_rule: Literal["cosine", "sum"] = "cosine",
    residual: Tensor | None = None,
) -> MergedTokens:
    """Prune the least important tokens, then merge the next ones into their most similar neighbours.

    Tokens are sorted by importance. The first ``k_p`` stay; the rest are pruned. Of the tokens that stay, those at
    sorted positions ``k_m .. k_p-1`` are merged, each into the token at positions ``P .. k_m-1`` with the most similar
    features (cosine; of bit-equal ones, the one at the lowest position). Section 3 of the paper.

    Args:
        x: features (B, N, C); any strides.
        attn: attention probabilities (B, H, N, N), their class rows (B, H, N), or importance (B, N) or (B, N-P).
        k_p: kept tokens after pruning, counting the prefix.
        k_m: kept tokens after merging: ``P+1 <= k_m < k_p <= N``, or ``P <= k_m = k_p <= N``.
        size: token sizes (B, N); None stands for ones.
        prefix: P.
        importance_from: how ``attn`` (B, H, N, N) becomes importance: ``"class"``, the class token's row, or
            ``"received"``, the mean over queries, for models without a class token. The mean over heads is taken in
            both.
        mean_rule: a merged token is ``"mean"``, the plain mean of its tokens (the paper), or ``"weighted"``, weighted
            by size (ToMe).
        size_rule: a merged token adds to its destination's size ``"cosine"``, its own size times their cosine (the
            paper), or ``"sum"``, its own size.
        residual: (B, N, C), added to x on the way in.

    Returns:
        x (B, k_m, C) and size (B, k_m) in sorted order, and slot (B, N) int64: the output position that holds each
        input token, -1 = pruned. Gradients reach x and residual; sizes and the matching are constants.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device, or the kept numbers do not fit.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    prefix = check_prefix(prefix, x.shape[1])
    _check_kept(k_p, k_m, prefix, x.shape[1])
    check_choice("importance_from", importance_from, ("class", "received"))
    check_choice("mean_rule", mean_rule, ("mean", "weighted"))
    check_choice("size_rule", size_rule, ("cosine", "sum"))
    attn = _check_attention(attn, x, prefix, importance_from)
    if size is not None:
        size = check_wide_vector("size", size, x, "x", (x.shape[0], x.shape[1]))
    if residual is not None:
        check_tensor("residual", residual, 3, "(B, N, C)")
        check_shape("residual", residual, x.shape, "the shape of x")
        check_like("residual", residual, "x", x, dtype=False)
        if residual.dtype != x.dtype:  # as x + residual would: under autocast the two differ
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    arguments = (x, attn, k_p, k_m, size, prefix, importance_from, mean_rule, size_rule, residual)
    return MergedTokens(*torch.ops.diffrate.prune_merge(*arguments))


def _check_kept(k_p: object, k_m: object, prefix: int, tokens: int) -> None:
    pruned, merged = check_int("k_p", k_p), check_int("k_m", k_m)
    if pruned > tokens:
        raise InputValueError(f"k_p must be at most the number of tokens, {tokens}, got {pruned}")
    if merged > pruned:
        raise InputValueError(f"k_m must be at most k_p, {pruned}, got {merged}")
    least = prefix if merged == pruned else prefix + 1
    if merged < least:
        reason = "the prefix" if merged == pruned else "the prefix and one token to merge into"
        raise InputValueError(f"k_m must be at least {least} ({reason}), got {merged}")


def _check_attention(attn: Tensor, x: Tensor, prefix: int, importance_from: str) -> Tensor:
    meaning = "(B, H, N, N), its class rows (B, H, N), or importance (B, N) or (B, N-P)"
    check_tensor("attn", attn, (2, 3, 4), meaning)
    if attn.ndim == 2:
        return check_importance("attn", attn, x, prefix)
    images, tokens = x.shape[:2]
    check_shape("attn", attn, (images, attn.shape[1], *[tokens] * (attn.ndim - 2)), "(B, H, N, N) or (B, H, N)")
    if attn.shape[1] == 0:
        raise InputValueError(f"attn must have at least one head, got shape {tuple(attn.shape)}")
    if attn.ndim == 4 and importance_from == "class" and prefix == 0:
        raise InputValueError(
            "importance_from='class' needs a class token (prefix >= 1), got prefix 0; use importance_from='received'"
        )
    check_like("attn", attn, "x", x, dtype=False)
    return constant(attn)


@torch.library.register_fake("diffrate::prune_merge")
def _(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None = None,
    prefix: int = 1,
    importance_from: str = "class",
    mean_rule: str = "mean",
    size_rule: str = "cosine",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, channels = x.shape
    return (
        x.new_empty(images, k_m, channels),
        x.new_empty((images, k_m), dtype=wide_dtype(x)),
        x.new_empty((images, tokens), dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    size, mean_rule, residual = inputs[4], inputs[7], inputs[9]
    _, out_size, slot = output
    ctx.mark_non_differentiable(out_size, slot)
    ctx.save_for_backward(slot, size.clamp_min(TINY) if mean_rule == "weighted" and size is not None else None)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    # linear in x and residual once the order and the matching are fixed: the gradient is that of merge_reduce
    slot, weights = ctx.saved_tensors
    grad_x = torch.ops.diffrate.merge_reduce_backward(grad, slot, weights)
    return (grad_x, *[None] * 8, grad_x if ctx.has_residual else None)


torch.library.register_autograd("diffrate::prune_merge", _backward, setup_context=_setup_context)
