from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputValueError
from ..modes import in_transform
from ..numeric import wide_dtype
from ._autograd import refuse_gradient, register_gradient, with_gradient
from ._checks import (
    check_choice,
    check_importance,
    check_like,
    check_prefix,
    check_shape,
    check_tensor,
    check_wide_vector,
    constant,
)


class MaskedTokens(NamedTuple):
    """What :func:`masked_prune_merge` returns."""

    x: Tensor
    mask: Tensor
    size: Tensor
    order: Tensor
    dst: Tensor


def masked_prune_merge(
    x: Tensor,
    mask: Tensor,
    importance: Tensor,
    size: Tensor | None,
    prune_prob: Tensor,
    merge_prob: Tensor,
    kept_p: Tensor,
    kept_m: Tensor,
    *,
    prefix: int = 1,
    size_rule: Literal["cosine", "sum"] = "cosine",
) -> MaskedTokens:
    """:func:`prune_merge` in the search step: all tokens stay, and a mask says which are alive.

    Tokens are sorted by importance. Of the ``last`` tokens that are alive, pruning masks those at positions from
    ``kept_p``; merging takes those at positions from ``kept_m`` as sources, gives each destination (positions
    ``P .. kept_m-1``) the mean over itself and its sources, and masks the sources. A number that is not below what is
    alive does nothing.

    Args:
        x: features (B, N, C); any strides.
        mask: (B, N), 1 for tokens that are alive, the same number in every image, 0 for the others.
        importance: (B, N-P) of the patches. Not differentiable.
        size: token sizes (B, N); None stands for ones.
        prune_prob, merge_prob: keep probabilities (N,) of :func:`compression_rate`. They are where the gradient of the
            mask goes, at every position; values are not used.
        kept_p, kept_m: 0-d, as :func:`compression_rate` gives them; other numbers count as the nearest whole ones.
            Constants here: their gradient is in the FLOPs. On CUDA they are read on the device: numbers that make no
            sense are not refused but raised until they do.
        prefix: P.
        size_rule: a source adds ``"cosine"``, its size times the cosine (the paper), or ``"sum"``, its size, and at
            least 1 in either case. Where anything merges, sizes of destinations below 1 first become 1.

    Returns:
        x (B, N, C), mask (B, N) and size (B, N) in sorted order; order (B, N) int64, the input position of each sorted
        position; and dst (B, N) int64, the sorted position that each sorted token was merged into, or its own.
        Gradients reach x, mask, prune_prob and merge_prob; order, matching and sizes are constants.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device; on the CPU also kept numbers
            that make no sense.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    images, tokens = x.shape[:2]
    prefix = check_prefix(prefix, tokens)
    check_choice("size_rule", size_rule, ("cosine", "sum"))
    importance = check_importance("importance", importance, x, prefix)
    mask = check_wide_vector("mask", mask, x, "x", (images, tokens))
    if size is not None:
        size = constant(check_wide_vector("size", size, x, "x", (images, tokens)))
    prune_prob = _check_rate("prune_prob", prune_prob, x, (tokens,), "(N,)")
    merge_prob = _check_rate("merge_prob", merge_prob, x, (tokens,), "(N,)")
    kept_p = _check_rate("kept_p", kept_p, x, (), "0-d").detach()
    kept_m = _check_rate("kept_m", kept_m, x, (), "0-d").detach()
    if images and x.device.type == "cpu" and not torch.compiler.is_compiling() and not in_transform():
        _check_kept(mask, kept_p, kept_m, prefix)
    arguments = (x, mask, importance, size, prune_prob, merge_prob, kept_p, kept_m, prefix, size_rule)
    return MaskedTokens(*with_gradient(torch.ops.diffrate.masked_prune_merge.default, *arguments))


def _check_rate(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...], meaning: str) -> Tensor:
    check_tensor(name, value, len(shape), meaning)
    check_shape(name, value, shape, meaning)
    check_like(name, value, "x", x, dtype=False)
    return value.to(wide_dtype(x))


def _check_kept(mask: Tensor, kept_p: Tensor, kept_m: Tensor, prefix: int) -> None:
    """Looked at on the CPU only, elsewhere looking would stop the stream; and not in transforms: see check_range."""
    alive = mask.detach()[0].sum()
    if not 0 <= alive <= mask.shape[1]:
        raise InputValueError(f"mask must lie in 0 .. 1, but its first row adds up to {float(alive)}")
    last, pruned, merged = _nearest_whole(torch.stack([alive, kept_p, kept_m]), mask.shape[1]).tolist()
    if pruned < prefix or kept_p.isnan():
        raise InputValueError(f"kept_p must be at least the prefix, {prefix}, got {float(kept_p):g}")
    if kept_m.isnan() or (merged < min(last, pruned) and merged < prefix + 1):
        raise InputValueError(
            f"kept_m must be at least {prefix + 1} (the prefix and one token to merge into), got {float(kept_m):g}"
        )


def _nearest_whole(numbers: Tensor, tokens: int) -> Tensor:
    """The nearest whole numbers in 0 .. tokens, halves up, 0 for NaN."""
    numbers = numbers.nan_to_num(nan=0.0).clamp(0, tokens)
    whole = numbers.floor()
    return whole + (numbers - whole >= 0.5)


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
    size_rule: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, wide = x.shape[:2], wide_dtype(x)
    positions = (x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.int64))
    return x.new_empty(x.shape), x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide), *positions


@torch.library.register_fake("diffrate::masked_prune_merge_backward")
def _(
    grad_out: Tensor | None,
    grad_out_mask: Tensor | None,
    mask: Tensor,
    order: Tensor,
    dst: Tensor,
    kept_p: Tensor,
    kept_m: Tensor,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = mask.shape[1]
    shapes = (mask.shape, (tokens,), (tokens,)) if grad_out_mask is not None else ((0,), (0,), (0,))
    of_x = mask.new_empty(0) if grad_out is None else grad_out.new_empty(grad_out.shape)
    of_mask, of_prune_prob, of_merge_prob = (mask.new_empty(shape) for shape in shapes)
    return of_x, of_mask, of_prune_prob, of_merge_prob


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    mask, kept_p, kept_m, ctx.prefix = inputs[1], *inputs[6:9]
    _, _, size, order, dst = output
    ctx.mark_non_differentiable(size, order, dst)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, order, dst, kept_p, kept_m)


def _backward(ctx: Any, grad_out: Tensor | None, grad_out_mask: Tensor | None, *_: Any) -> tuple:
    needs_x, needs_mask, _, _, needs_prune_prob, needs_merge_prob, *_ = ctx.needs_input_grad
    with_x = needs_x and grad_out is not None
    with_mask = (needs_mask or needs_prune_prob or needs_merge_prob) and grad_out_mask is not None
    if not with_x and not with_mask:
        return (None,) * 10
    of_x, of_mask, of_prune_prob, of_merge_prob = with_gradient(
        torch.ops.diffrate.masked_prune_merge_backward.default,
        grad_out if with_x else None,
        grad_out_mask if with_mask else None,
        *ctx.saved_tensors,
        ctx.prefix,
    )
    rates = (of_prune_prob, of_merge_prob) if with_mask else (None, None)
    return of_x if with_x else None, of_mask if with_mask else None, None, None, *rates, *[None] * 4


register_gradient("masked_prune_merge", _backward, _setup_context)
refuse_gradient("masked_prune_merge_backward", "masked_prune_merge cannot be differentiated twice")
