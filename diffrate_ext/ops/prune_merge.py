from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputValueError
from ..numeric import TINY, wide_dtype
from ._autograd import refuse_gradient, register_gradient, with_gradient
from ._call import REFUSED, call, needs_gradient
from ._checks import (
    check_choice,
    check_importance,
    check_int,
    check_like,
    check_prefix,
    check_residual,
    check_shape,
    check_tensor,
    check_wide_vector,
    constant,
)
from ._norm import Norm, check_norm, is_plain


class MergedTokens(NamedTuple):
    """What :func:`prune_merge` returns."""

    x: Tensor
    size: Tensor
    slot: Tensor


class NormalizedTokens(NamedTuple):
    """What :func:`prune_merge` returns with a ``norm``."""

    x: Tensor
    size: Tensor
    slot: Tensor
    normalized: Tensor


@overload
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
    norm: None = None,
) -> MergedTokens: ...


@overload
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
    norm: Norm,
) -> NormalizedTokens: ...


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
    norm: Norm | None = None,
) -> MergedTokens | NormalizedTokens:
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
        norm: also return the result's x layer-normalised, as what follows in a block wants it. Its weight and bias have
            the dtype of x, after the residual.

    Returns:
        x (B, k_m, C) and size (B, k_m) in sorted order, and slot (B, N) int64: the output position that holds each
        input token, -1 = pruned. With ``norm`` also normalized (B, k_m, C), of the dtype of x. Gradients reach x,
        residual, and the norm's weight and bias; sizes and the matching are constants.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device, or the kept numbers do not fit.
    """
    arguments = (x, attn, k_p, k_m, size, prefix, importance_from, mean_rule, size_rule, residual)
    refused: Exception | None = None
    try:
        if _are_plain(x, attn, k_p, k_m, size, prefix, residual, norm):
            return _run(arguments, norm)
    except REFUSED as error:
        refused = error
    checked = _check(*arguments, norm)
    if refused is not None:
        raise refused
    return _run(checked, norm)


def _run(arguments: tuple, norm: Norm | None) -> MergedTokens | NormalizedTokens:
    x, *others, residual = arguments
    if norm is None:
        return MergedTokens(*call(torch.ops.diffrate.prune_merge.default, arguments, x, residual))
    if needs_gradient(x, residual, *norm[:2]):
        check_norm(norm, x)
        merged = MergedTokens(*with_gradient(torch.ops.diffrate.prune_merge.default, *arguments))
        normalized = F.layer_norm(merged.x, (x.shape[2],), *norm)
        return NormalizedTokens(*merged, normalized.to(x.dtype))  # under autocast it is float32
    attn, k_p, k_m, *options = others
    arguments = (x, attn, k_p, k_m, *norm, *options, residual)
    return NormalizedTokens(*call(torch.ops.diffrate.prune_merge_norm.default, arguments))


def _are_plain(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None,
    prefix: int,
    residual: Tensor | None,
    norm: Norm | None,
) -> bool:
    """Whether the operator takes these as they are, and checks them as :func:`_check` does."""
    return (
        type(k_p) is type(k_m) is type(prefix) is int
        and attn.ndim != 4
        and not attn.requires_grad
        and (size is None or size.dtype == wide_dtype(x))
        and (residual is None or residual.dtype == x.dtype)
        and (norm is None or is_plain(norm))
    )


def _check(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None,
    prefix: int,
    importance_from: str,
    mean_rule: str,
    size_rule: str,
    residual: Tensor | None,
    norm: Norm | None = None,
) -> tuple:
    """The operator's arguments, of the dtypes that it takes."""
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
        x, residual = check_residual(residual, x)
    if norm is not None:
        check_norm(norm, x)
    return x, attn, k_p, k_m, size, prefix, importance_from, mean_rule, size_rule, residual


def _check_kept(k_p: object, k_m: object, prefix: int, tokens: int) -> None:
    pruned, merged = check_int("k_p", k_p), check_int("k_m", k_m)
    if pruned > tokens:
        raise InputValueError(f"k_p must be at most the number of tokens, {tokens}, got {pruned}")
    if pruned < prefix:
        raise InputValueError(f"k_p must be at least {prefix} (the prefix), got {pruned}")
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
def _fake(
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
    _check(x, attn, k_p, k_m, size, prefix, importance_from, mean_rule, size_rule, residual)
    images, tokens, channels = x.shape
    return (
        x.new_empty(images, k_m, channels),
        x.new_empty((images, k_m), dtype=wide_dtype(x)),
        x.new_empty((images, tokens), dtype=torch.int64),
    )


@torch.library.register_fake("diffrate::prune_merge_norm")
def _(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    norm_eps: float,
    *options: Any,
    **others: Any,
) -> tuple[Tensor, ...]:
    check_norm(Norm(norm_weight, norm_bias, norm_eps), x)
    merged = _fake(x, attn, k_p, k_m, *options, **others)
    return (*merged, torch.empty_like(merged[0]))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    size, mean_rule, residual = inputs[4], inputs[7], inputs[9]
    _, out_size, slot = output
    ctx.mark_non_differentiable(out_size, slot)
    ctx.save_for_backward(slot, size.clamp_min(TINY) if mean_rule == "weighted" and size is not None else None)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    # linear in x and residual once the order and the matching are fixed: the gradient is that of merge_reduce
    slot, weights = ctx.saved_tensors
    grad_x = with_gradient(torch.ops.diffrate.merge_reduce_backward.default, grad, slot, weights)
    return (grad_x, *[None] * 8, grad_x if ctx.has_residual else None)


register_gradient("prune_merge", _backward, _setup_context)

refuse_gradient("prune_merge_norm", "prune_merge_norm has no gradient: ops.prune_merge(norm=...) has one")
