"""The operators of :mod:`diffrate_ext.ops` in plain PyTorch: their specification, and the oracle of the tests.

Written to be read, not to be fast: each function follows the formulas of DiffRate (Chen et al., ICCV 2023) step by step
and takes the same arguments as its operator. Arguments are not checked here. Any floating-point dtype works, so a test
can compute the same thing in float64. Notation: B images, N tokens of which the first P (``prefix``) are class and
register tokens, C channels, H heads, D channels per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .numeric import TINY, rate_candidates, wide_dtype

# Of the masked softmax: keeps a row of which nothing is left from dividing by zero.
MASKED_EPSILON = 1e-6


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, j]]`` for x (B, N, C) and index (B, K)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def token_importance(attn: Tensor, prefix: int, importance_from: str, dtype: torch.dtype) -> Tensor:
    """Importance of the patches, (B, N-P).

    ``attn`` is attention (B, H, N, N), its class rows (B, H, N), or importance itself, which passes through.
    """
    attn = attn.to(dtype)
    if attn.ndim == 4:
        attn = attn[:, :, 0] if importance_from == "class" else attn.mean(2)
    if attn.ndim == 3:
        return attn.mean(1)[:, prefix:]
    return attn


def sort_order(importance: Tensor, prefix: int) -> Tensor:
    """Input position of each sorted position, (B, N): prefix first, then patches by descending importance.

    Ties keep their order; NaN comes last.
    """
    by_value = importance.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = by_value.argsort(dim=1, descending=True, stable=True)
    is_nan = importance.isnan().gather(1, order)
    order = order.gather(1, is_nan.to(torch.int8).argsort(dim=1, stable=True))
    first = torch.arange(prefix, device=importance.device).expand(len(importance), -1)
    return torch.cat([first, order + prefix], dim=1)


def sort_tokens(
    x: Tensor, importance: Tensor, size: Tensor | None = None, *, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in descending importance (token sorting, section 3 of the paper)."""
    patches = importance[:, importance.shape[1] - (x.shape[1] - prefix) :]
    order = sort_order(patches, prefix)
    ones = torch.ones(x.shape[:2], dtype=wide_dtype(x), device=x.device)
    size = ones if size is None else size.to(ones.dtype)
    return gather_tokens(x, order), size.gather(1, order), order


def match_tokens(x: Tensor, k_p: int, k_m: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The most similar destination of each source, for x (B, N, C) in sorted order.

    Sources are positions k_m .. k_p-1, destinations prefix .. k_m-1.

    Returns:
        the destinations' positions and the cosines, both (B, k_p - k_m). Of equal destinations: the lowest position.
    """
    unit = F.normalize(x.to(wide_dtype(x)), dim=-1)
    cosine = unit[:, k_m:k_p] @ unit[:, prefix:k_m].transpose(1, 2)
    # a NaN feature is similar to nothing
    best, index = cosine.nan_to_num(nan=-torch.inf).max(dim=-1)
    # rounding may tell equal destinations apart
    destinations = x[:, prefix:k_m]
    chosen = gather_tokens(destinations, index)
    index = (destinations[:, None] == chosen[:, :, None]).all(-1).int().argmax(-1)
    return index + prefix, torch.where(best.isinf(), torch.nan, best)


def prune_merge(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None = None,
    *,
    prefix: int = 1,
    importance_from: str = "class",
    mean_rule: str = "mean",
    size_rule: str = "cosine",
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
) -> tuple[Tensor, ...]:
    """Sort, prune to k_p tokens, merge to k_m, as at inference (section 3 of the paper)."""
    if residual is not None:
        x = x + residual
    patches = token_importance(attn, prefix, importance_from, wide_dtype(x))
    x, size, order = sort_tokens(x, patches, size, prefix=prefix)

    position = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    target = torch.where(position < k_m, position, -1)  # output position of each sorted position
    merged_size = size[:, :k_m]
    if k_m < k_p:
        match, cosine = match_tokens(x.detach(), k_p, k_m, prefix)
        target = torch.cat([target[:, :k_m], match, target[:, k_p:]], dim=1)
        gained = size[:, k_m:k_p] * cosine if size_rule == "cosine" else size[:, k_m:k_p]
        merged_size = merged_size.scatter_add(1, match, gained.to(merged_size.dtype))
    out = merge_reduce(x, target, k_m, weights=size.clamp_min(TINY) if mean_rule == "weighted" else None)
    slot = torch.empty_like(target).scatter_(1, order, target)
    return (out, merged_size, slot) if norm is None else (out, merged_size, slot, layer_norm(out, *norm))


def add_norm(x: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor | None, float]) -> tuple[Tensor, Tensor]:
    """The sum of two tensors, and its layer normalization."""
    x = x + residual
    return x, layer_norm(x, *norm)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the channels of the tokens, as they were rounded to their dtype."""
    wide = x.to(wide_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (unit * weight + (0 if bias is None else bias)).to(x.dtype)


def bipartite_match(keys: Tensor, merged: int, *, prefix: int = 1) -> Tensor:
    """ToMe's bipartite soft matching (section 3 of its paper), image by image and token by token."""
    slot = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    even, odd = ([token for token in range(prefix, keys.shape[1]) if token % 2 == parity] for parity in (0, 1))
    for image, unit in enumerate(F.normalize(keys.to(wide_dtype(keys)), dim=-1)):
        nearest = {}
        for token in even if merged else ():
            cosines = (unit[odd] @ unit[token]).nan_to_num(nan=-torch.inf)
            nearest[token] = (float(cosines.max()), odd[int(cosines.argmax())])
        merging = sorted(nearest, key=lambda token: -nearest[token][0])[:merged]  # of equal ones the first
        stay = [*range(prefix), *(token for token in even if token not in merging), *odd]
        for position, token in enumerate(stay):
            slot[image, token] = position
        for token in merging:
            slot[image, token] = slot[image, nearest[token][1]]
    return slot


def merge_reduce(
    x: Tensor, dst: Tensor, kept: int, *, weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Mean of the tokens that share a destination, optionally weighted: (B, N, C) -> (B, kept, C).

    ``dst`` (B, N) is -1 for tokens that go nowhere. A destination without tokens is zero.
    """
    if residual is not None:
        x = x + residual
    dtype = wide_dtype(x)
    weights = torch.ones(dst.shape, dtype=dtype, device=x.device) if weights is None else weights.to(dtype)
    weights = torch.where(dst < 0, 0, weights)
    # one more row takes what goes nowhere
    index = torch.where(dst < 0, kept, dst)
    total = torch.zeros(len(x), kept + 1, dtype=dtype, device=x.device).scatter_add(1, index, weights)
    weighted = torch.where((dst < 0)[..., None], 0, x.to(dtype) * weights[..., None])
    summed = torch.zeros(len(x), kept + 1, x.shape[2], dtype=dtype, device=x.device)
    summed = summed.scatter_add(1, index[..., None].expand_as(weighted), weighted)
    filled = total[..., None] != 0
    return torch.where(filled, summed / torch.where(filled, total[..., None], 1), 0)[:, :kept].to(x.dtype)


def attention_map(q: Tensor, k: Tensor, size: Tensor | None, scale: float | None) -> Tensor:
    """softmax(scale q k^T + log size), (B, H, N, N)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q.to(wide_dtype(q)) @ k.to(wide_dtype(q)).transpose(-1, -2)) * scale
    if size is not None:
        logits = logits + size.to(logits.dtype).clamp_min(TINY).log()[:, None, None]
    return logits.softmax(-1)


def class_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 1
) -> Tensor:
    """Class attention of the patches, mean over heads: (B, N-P) (token sorting, section 3 of the paper)."""
    return token_importance(attention_map(q, k, size, scale).detach(), prefix, "class", wide_dtype(q))


def received_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 0
) -> Tensor:
    """Attention that each patch receives, mean over heads and queries: (B, N-P)."""
    return token_importance(attention_map(q, k, size, scale).detach(), prefix, "received", wide_dtype(q))


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance_from: str | None = "class",
) -> tuple[Tensor, Tensor | None]:
    """Attention in which a token counts as often as it has tokens merged in, and the importance that follows."""
    attn = attention_map(q, k, size, scale)
    out = (attn @ v.to(attn.dtype)).to(v.dtype)
    if importance_from is None:
        return out, None
    if importance_from == "class_rows":
        return out, attn[:, :, 0].detach()
    return out, token_importance(attn.detach(), prefix, importance_from, attn.dtype)


def compose_slots(first: Tensor, second: Tensor) -> Tensor:
    """Where a token ends up after two compressions: ``second[first]``, -1 once it is pruned."""
    through = second.gather(1, first.clamp_min(0))
    return torch.where(first < 0, -1, through)


def restore_tokens(x: Tensor, slot: Tensor, fill: Tensor | None = None) -> Tensor:
    """Every token's place gets the token that absorbed it; pruned places get ``fill``, (C,) or (B, N, C), or zeros."""
    restored = gather_tokens(x, slot.clamp_min(0))
    fill = torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device) if fill is None else fill
    return torch.where((slot < 0)[..., None], fill, restored)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance_from: str = "class",
    mask_gradient: str = "derivative",
) -> tuple[Tensor, Tensor]:
    """Attention of the search step, in which a masked token is visible only to itself (section 3 of the paper).

    ``P_ij = M_j + (1 - M_j) [i = j]``, ``A_ij = (e_ij P_ij + eps/N) / (sum_l e_il P_il + eps)``. Attention received
    is the mean over the queries that are not masked, as at inference there are no others. The mask's gradient has the
    weights ``e_ij / Z_i``, Z the sum below, or as a "difference" ``e_ij / (Z_i + (1 - M_j) e_ij)``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, tokens = wide_dtype(q), q.shape[2]
    logits = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale
    if size is not None:
        logits = logits + size.detach().to(dtype).clamp_min(TINY).log()[:, None, None]
    e = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    mask = mask.to(dtype)[:, None, None]
    own = torch.eye(tokens, dtype=dtype, device=q.device)
    visible = mask + (1 - mask) * own
    if mask_gradient == "difference":
        z = (e * visible).sum(-1, keepdim=True) + MASKED_EPSILON
        weaker = (z / (z + (1 - mask) * e)).detach()
        visible = visible.detach() + weaker * (visible - visible.detach())
    seen = e * visible
    attn = (seen + MASKED_EPSILON / tokens) / (seen.sum(-1, keepdim=True) + MASKED_EPSILON)
    out = (attn @ v.to(dtype)).to(v.dtype)
    attn = attn.detach()
    if importance_from == "class":
        return out, attn[:, :, 0].mean(1)[:, prefix:]
    alive = mask.detach().transpose(-1, -2)
    received = (attn * alive).sum(2) / alive.sum(2).clamp_min(TINY)
    return out, received.mean(1)[:, prefix:]


def compression_rate(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """The differentiable discrete proxy (section 3 of the paper), all blocks at once.

    ``kept = ceil(sum_k c_k p_k) + P`` with a straight-through gradient, ``t_j = sum_k p_k [j < c_k + P]``. In float64
    whatever the logits are: rounding must not carry a mean over a whole number.
    """
    p = logits.double().softmax(-1)
    candidates = torch.tensor(rate_candidates(n_patches, granularity), device=logits.device)
    mean = (p * candidates).sum(-1)
    kept = mean + (mean.ceil() - mean).detach() + prefix
    position = torch.arange(n_patches + prefix, device=logits.device)
    keeps = position < candidates[:, None] + prefix  # (K, N)
    return kept.to(logits.dtype), (p @ keeps.to(p.dtype)).to(logits.dtype)


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
    size_rule: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort, prune and merge in the search step (section 3 of the paper): tokens are masked, not dropped."""
    x, size, order = sort_tokens(x, importance, size, prefix=prefix)
    mask = mask.to(size.dtype).gather(1, order)
    images, tokens = mask.shape
    position = torch.arange(tokens, device=x.device)
    numbers = (kept_p, kept_m, mask[0].sum() if images else torch.tensor(tokens))
    pruned, merged, last = (math.floor(float(number.detach()) + 0.5) for number in numbers)  # the nearest whole ones

    def straight_through(first: int, end: int, probability: Tensor) -> Tensor:
        """0 at positions first .. end-1, 1 elsewhere, with the gradient of the probability."""
        hard = ((position < first) | (position >= end)).to(mask.dtype)
        return hard + (probability - probability.detach()).to(mask.dtype)

    if pruned < last:
        mask = mask * straight_through(pruned, last, prune_prob)
    middle = min(last, pruned)
    dst = position.expand(images, -1)
    if merged < middle:
        match, cosine = match_tokens(x.detach(), middle, merged, prefix)
        dst = torch.cat([dst[:, :merged], match, dst[:, middle:]], dim=1)
        gained = size[:, merged:middle] * cosine if size_rule == "cosine" else size[:, merged:middle]
        size = torch.cat([size[:, :merged], gained.to(size.dtype), size[:, middle:]], dim=1)
        size = torch.where(position < middle, size.clamp_min(1), size)
        size = size.scatter_add(1, match, size[:, merged:middle])
        means = merge_reduce(x, dst, tokens)
        x = torch.where((position < merged)[:, None], means, x)
        mask = mask * straight_through(merged, middle, merge_prob)
    return x, mask, size, order, dst.contiguous()
