"""Are a contender's results right? Asked before anything is timed.

The yardstick is :mod:`diffrate_ext.reference` in float64. A floating-point result may be twice as far from it as the
reference in the contender's own dtype is, plus one rounding of the input's dtype and what another order of summation
was seen to cost in float32. Discrete results: the order must be exact; a match is right when its cosine is within
rounding of the best.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffrate_ext import reference

SUMMATION = 8 * torch.finfo(torch.float32).eps


class WrongResultError(AssertionError):
    """A contender's result differs from the reference by more than rounding."""


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|``; NaN becomes infinity."""
    actual, exact = actual.double(), exact.double()
    error = float((actual - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def wide(value: Any) -> Any:
    """Floating-point tensors in float64, everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_close(name: str, actual: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Raises WrongResultError unless ``actual`` is about as close to ``exact`` as ``eager`` is; returns its error.

    ``dtype`` is that of the inputs: eager code computes importances, though float32, from logits of that dtype.
    """
    if actual.shape != exact.shape:
        raise WrongResultError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    error = relative_error(actual, exact)
    allowed = 2 * relative_error(eager, exact) + torch.finfo(dtype).eps + SUMMATION
    if not error <= allowed:
        raise WrongResultError(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    return error


def check_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape or not torch.equal(actual, expected):
        raise WrongResultError(f"{name} differs from the reference")


def check_function(name: str, function: Any, actual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Checks all outputs of a continuous operator against ``function`` of the reference; returns the largest error."""
    eager = function(*args, **kwargs)
    exact = function(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
    if isinstance(actual, Tensor):
        actual, eager, exact = (actual,), (eager,), (exact,)
    dtype = args[0].dtype
    return max(
        check_close(f"{name}[{i}]", *triple, dtype) for i, triple in enumerate(zip(actual, eager, exact, strict=True))
    )


def check_sort_tokens(
    actual: tuple[Tensor, Tensor, Tensor], x: Tensor, importance: Tensor, size: Tensor, *, prefix: int = 1
) -> float:
    """Nothing is computed, so everything is exact."""
    expected = reference.sort_tokens(x, importance, size, prefix=prefix)
    for name, a, b in zip(("x", "size", "order"), actual, expected, strict=True):
        check_equal(f"sort_tokens: {name}", a, b)
    return 0.0


def check_prune_merge(
    actual: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    importance: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor,
    *,
    residual: Tensor | None = None,
    prefix: int = 1,
) -> float:
    """Order exact, matches within rounding of the best; features and sizes given the contender's own matches."""
    out, out_size, slot = actual
    eps = torch.finfo(x.dtype).eps
    features = wide(x) if residual is None else wide(x) + wide(residual)
    order = reference.sort_order(importance[:, importance.shape[1] - (x.shape[1] - prefix) :], prefix)
    by_order = slot.gather(1, order)
    check_equal("prune_merge: slot of kept tokens", by_order[:, :k_m], torch.arange(k_m).to(slot).expand(len(x), -1))
    check_equal("prune_merge: slot of pruned tokens", by_order[:, k_p:], torch.full_like(by_order[:, k_p:], -1))

    match = by_order[:, k_m:k_p]
    merged_size = wide(size).gather(1, order[:, :k_m])
    if k_m < k_p:
        if not bool(((match >= prefix) & (match < k_m)).all()):
            raise WrongResultError("prune_merge: a token was merged into something that is no destination")
        unit = torch.nn.functional.normalize(reference.gather_tokens(features, order[:, :k_p]), dim=-1)
        cosine = unit[:, k_m:] @ unit[:, prefix:k_m].transpose(1, 2)
        chosen = cosine.gather(2, (match - prefix).unsqueeze(-1)).squeeze(-1)
        worst = float((cosine.amax(-1) - chosen).max())
        if not worst <= 4 * eps:
            raise WrongResultError(f"prune_merge: a match misses the best cosine by {worst:.2e}")
        gained = wide(size).gather(1, order[:, k_m:k_p]) * chosen
        merged_size = merged_size.scatter_add(1, match, gained)

    narrow = x if residual is None else x + residual
    features_error = check_close(
        "prune_merge: x",
        out,
        reference.merge_reduce(narrow, slot, k_m),
        reference.merge_reduce(features, slot, k_m),
        x.dtype,
    )
    # half-precision features give half-precision cosines in eager code
    size_error = check_close("prune_merge: size", out_size, merged_size.to(x.dtype), merged_size, x.dtype)
    return max(features_error, size_error)


def check_prune_merge_norm(
    actual: tuple[Tensor, ...], norm: tuple[Tensor, Tensor | None, float], *arguments: Any, **options: Any
) -> float:
    """The same, and the norm of the contender's own features."""
    *merged, normalized = actual
    error = check_prune_merge(tuple(merged), *arguments, **options)  # type: ignore[arg-type]
    return max(
        error, check_function("prune_merge: normalized", reference.layer_norm, normalized, (merged[0], *norm), {})
    )


def check_bipartite_match(slot: Tensor, keys: Tensor, merged: int, *, prefix: int = 1) -> float:
    """Slots exact but for the choice; what merges, and into what, within rounding of the best."""
    tokens, rounding = keys.shape[2], 8 * torch.finfo(keys.dtype).eps
    unit = torch.nn.functional.normalize(keys.mean(1).double(), dim=-1)
    even, odd = slice(prefix + prefix % 2, None, 2), slice(prefix + (prefix + 1) % 2, None, 2)
    cosine = unit[:, even] @ unit[:, odd].transpose(1, 2)
    first = prefix + cosine.shape[1] - merged
    merges = slot[:, even] >= first
    stays = torch.where(merges, slot[:, even], prefix - 1 + (~merges).cumsum(1))
    check_equal(
        "bipartite_match: slot of the prefix", slot[:, :prefix], torch.arange(prefix).to(slot).expand(len(slot), -1)
    )
    check_equal("bipartite_match: slot of what stays", slot[:, even], stays)
    kept = torch.arange(first, tokens - merged).to(slot).expand(len(slot), -1)
    check_equal("bipartite_match: slot of odd positions", slot[:, odd], kept)
    check_equal("bipartite_match: number of what merges", merges.sum(1), slot.new_full((len(slot),), merged))
    best = cosine.amax(-1)
    chosen = cosine.gather(2, (slot[:, even] - first).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    missed = float((best - chosen)[merges].max())
    overlooked = float((best.masked_fill(merges, -2).amax(1) - best.masked_fill(~merges, 2).amin(1)).max())
    if not max(missed, overlooked) <= rounding:
        raise WrongResultError(f"bipartite_match: misses the best cosines by {max(missed, overlooked):.2e}")
    return 0.0


def check_masked_prune_merge(
    actual: tuple[Tensor, ...],
    grad_x: Tensor,
    grad_mask: Tensor,
    x: Tensor,
    mask: Tensor,
    importance: Tensor,
    size: Tensor,
    prune_prob: Tensor,
    merge_prob: Tensor,
    kept_p: Tensor,
    kept_m: Tensor,
    *,
    prefix: int = 1,
) -> float:
    """A search step with gradients: order exact, matches within rounding of the best, the rest given those matches.

    ``actual``: x, mask, size, order, dst, and the gradients of x, mask, prune_prob and merge_prob.
    """
    *values, order, dst = actual[:5]
    check_equal("masked_prune_merge: order", order, reference.sort_order(importance, prefix))
    last, pruned, merged = int(mask[0].sum()), int(kept_p), int(kept_m)
    middle, tokens = min(last, pruned), x.shape[1]
    if not prefix < merged < middle < last:
        raise ValueError("only calls that prune and merge are checked")
    position = torch.arange(tokens, device=x.device)
    stays = (position < merged) | (position >= middle)
    check_equal("masked_prune_merge: dst", torch.where(stays, dst, position), position.expand_as(dst))
    match = dst[:, merged:middle]
    if not bool(((match >= prefix) & (match < merged)).all()):
        raise WrongResultError("masked_prune_merge: a token was merged into something that is no destination")

    unit = torch.nn.functional.normalize(reference.gather_tokens(wide(x.detach()), order), dim=-1)
    cosine = unit[:, merged:middle] @ unit[:, prefix:merged].transpose(1, 2)
    chosen = cosine.gather(2, (match - prefix).unsqueeze(-1)).squeeze(-1)
    worst = float((cosine.amax(-1) - chosen).max())
    if not worst <= 4 * torch.finfo(x.dtype).eps:
        raise WrongResultError(f"masked_prune_merge: a match misses the best cosine by {worst:.2e}")

    def step(convert: Any) -> list[Tensor]:
        leaves = [convert(tensor).detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
        features, alive = reference.gather_tokens(leaves[0], order), leaves[1].gather(1, order)
        sizes = convert(size).gather(1, order)
        gained = (sizes[:, merged:middle] * chosen.to(sizes.dtype)).clamp_min(1)
        kept_size = sizes[:, :merged].clamp_min(1).scatter_add(1, match, gained)
        for first, end, probability in ((pruned, last, leaves[2]), (merged, middle, leaves[3])):
            hard = ((position < first) | (position >= end)).to(alive.dtype)
            alive = alive * (hard + (probability - probability.detach()))
        means = reference.merge_reduce(features, dst, tokens)
        features = torch.where((position < merged)[:, None], means, features)
        gradients = torch.autograd.grad([features, alive], leaves, [convert(grad_x), convert(grad_mask)])
        results = [features, alive, torch.cat([kept_size, gained, sizes[:, middle:]], dim=1)]
        return [tensor.detach() for tensor in (*results, *gradients)]

    names = ("x", "mask", "size", *(f"gradient of {name}" for name in ("x", "mask", "prune_prob", "merge_prob")))
    found = zip(names, (*values, *actual[5:]), step(lambda tensor: tensor), step(wide), strict=True)
    return max(check_close(f"masked_prune_merge: {name}", a, eager, exact, x.dtype) for name, a, eager, exact in found)
