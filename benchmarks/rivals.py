"""The rivals: token compression in eager PyTorch, as a good engineer writes it without kernels of their own.

Same signatures and results as :mod:`diffrate_ext.ops`, for finite importances. ``compression_rate`` also comes as the
loop over candidates that is found in the field, and ``sort_tokens`` and ``prune_merge`` in two forms. The
plain names use the functions everybody reaches for (``gather``, ``normalize``, ``bmm``, ``scatter_reduce``), applied
only to the tokens that stay or merge. The ``_tuned`` names are what profiling on a CPU turns them into: whole rows move
through ``index_select`` and ``index_add_``, and norms are divided out of the small similarity matrix instead of the
features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def _patch_importance(attn: Tensor, tokens: int, prefix: int, importance_from: str) -> Tensor:
    """Importance (B, N-P) in float32 from a map (B, H, N, N), class rows (B, H, N), or importance itself."""
    if attn.ndim == 4:
        attn = attn[:, :, 0] if importance_from == "class" else attn.mean(2)
    if attn.ndim == 3:
        attn = attn.mean(1)
    if attn.dtype != torch.float64:
        attn = attn.float()
    return attn[:, attn.shape[1] - (tokens - prefix) :]


def _descending_order(importance: Tensor, prefix: int) -> Tensor:
    order = importance.argsort(dim=1, descending=True, stable=True) + prefix
    first = torch.arange(prefix, device=order.device).expand(len(order), -1)
    return torch.cat([first, order], dim=1)


def _ones(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.ones(x.shape[:2], dtype=dtype, device=x.device)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _flat_rows(index: Tensor, rows: int) -> Tensor:
    """Row numbers in the (B * rows, C) view, for index (B, K)."""
    return (index + rows * torch.arange(len(index), device=index.device).unsqueeze(1)).flatten()


def _select_rows(x: Tensor, index: Tensor) -> Tensor:
    picked = x.reshape(-1, x.shape[2]).index_select(0, _flat_rows(index, x.shape[1]))
    return picked.view(*index.shape, x.shape[2])


def sort_tokens(
    x: Tensor, importance: Tensor, size: Tensor | None = None, *, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Argsort, then two gathers."""
    order = _descending_order(_patch_importance(importance, x.shape[1], prefix, "class"), prefix)
    return _gather_rows(x, order), (_ones(x) if size is None else size.gather(1, order)), order


def sort_tokens_tuned(
    x: Tensor, importance: Tensor, size: Tensor | None = None, *, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Argsort, then whole rows by index_select."""
    order = _descending_order(_patch_importance(importance, x.shape[1], prefix, "class"), prefix)
    return _select_rows(x, order), (_ones(x) if size is None else size.gather(1, order)), order


def _slots(order: Tensor, match: Tensor, k_p: int, k_m: int) -> Tensor:
    slot = torch.full_like(order, -1)
    kept = torch.arange(k_m, device=order.device).expand(len(order), -1)
    return slot.scatter_(1, order[:, :k_p], torch.cat([kept, match], dim=1))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Argsort, gather the k_p tokens that stay or merge, normalise, bmm, max, scatter_reduce."""
    if residual is not None:
        x = x + residual
    order = _descending_order(_patch_importance(attn, x.shape[1], prefix, importance_from), prefix)
    x = _gather_rows(x, order[:, :k_p])
    size = _ones(x) if size is None else size.gather(1, order[:, :k_p])
    kept, kept_size = x[:, :k_m], size[:, :k_m]
    if k_m == k_p:
        return kept, kept_size, _slots(order, order[:, :0], k_p, k_m)

    unit = F.normalize(x[:, prefix:], dim=-1)
    similarity = unit[:, k_m - prefix :] @ unit[:, : k_m - prefix].transpose(1, 2)
    cosine, match = similarity.max(dim=-1)
    match = match + prefix

    rows = match.unsqueeze(-1).expand(-1, -1, x.shape[2])
    if mean_rule == "mean":
        kept = kept.scatter_reduce(1, rows, x[:, k_m:], "mean")
    else:
        weight = size.clamp_min(TINY)
        weighted = x * weight.unsqueeze(-1)
        total = weight[:, :k_m].scatter_add(1, match, weight[:, k_m:])
        kept = (weighted[:, :k_m].scatter_add(1, rows, weighted[:, k_m:]) / total.unsqueeze(-1)).to(x.dtype)
    gained = size[:, k_m:] * cosine if size_rule == "cosine" else size[:, k_m:]
    return kept, kept_size.scatter_add(1, match, gained), _slots(order, match, k_p, k_m)


def prune_merge_tuned(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise select and add, with the norms divided out of the similarities; works in place on its own output."""
    order = _descending_order(_patch_importance(attn, x.shape[1], prefix, importance_from), prefix)
    kept = _select_rows(x, order[:, :k_m])
    if residual is not None:
        kept += _select_rows(residual, order[:, :k_m])
    size = _ones(x) if size is None else size
    kept_size = size.gather(1, order[:, :k_m])
    if k_m == k_p:
        return kept, kept_size, _slots(order, order[:, :0], k_p, k_m)

    sources = _select_rows(x, order[:, k_m:k_p])
    if residual is not None:
        sources += _select_rows(residual, order[:, k_m:k_p])
    source_size = size.gather(1, order[:, k_m:k_p])
    length = torch.linalg.vector_norm(kept[:, prefix:], dim=-1, dtype=size.dtype).clamp_min_(1e-12)
    similarity = sources @ kept[:, prefix:].transpose(1, 2) / length.unsqueeze(1)
    best, match = similarity.max(dim=-1)  # the source's own length does not change which destination is best
    match = match + prefix
    gained = source_size
    if size_rule == "cosine":
        gained = source_size * best / torch.linalg.vector_norm(sources, dim=-1, dtype=size.dtype).clamp_min_(1e-12)

    if mean_rule == "mean":
        weight, source_weight = torch.ones_like(kept_size), torch.ones_like(source_size)
    else:
        weight, source_weight = kept_size.clamp_min(TINY), source_size.clamp_min(TINY)
        kept = kept * weight.unsqueeze(-1)
        sources = sources * source_weight.unsqueeze(-1)
    rows = _flat_rows(match, k_m)
    kept.view(-1, x.shape[2]).index_add_(0, rows, sources.view(-1, x.shape[2]))
    weight = weight.scatter_add(1, match, source_weight)
    kept = (kept / weight.unsqueeze(-1)).to(x.dtype)
    return kept, kept_size.scatter_add_(1, match, gained.to(kept_size.dtype)), _slots(order, match, k_p, k_m)


def merge_reduce(x: Tensor, dst: Tensor, kept: int, *, weights: Tensor | None = None) -> Tensor:
    """One index_add of whole rows, with a spare row for the tokens that go nowhere."""
    batch, _, channels = x.shape
    weight = _ones(x) if weights is None else weights.to(_ones(x).dtype)
    rows = _flat_rows(torch.where(dst < 0, kept, dst), kept + 1)
    total = weight.new_zeros(batch * (kept + 1)).index_add_(0, rows, weight.flatten())
    weighted = x.to(weight.dtype) if weights is None else x * weight.unsqueeze(-1)
    summed = weight.new_zeros(batch * (kept + 1), channels).index_add_(0, rows, weighted.reshape(-1, channels))
    total = total.where(total != 0, 1)
    return (summed / total.unsqueeze(-1)).view(batch, kept + 1, channels)[:, :kept].to(x.dtype)


def _logits(q: Tensor, k: Tensor, size: Tensor | None, scale: float | None) -> Tensor:
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if size is not None:
        logits = logits + size.clamp_min(TINY).log().to(logits.dtype)[:, None, None]
    return logits


def bipartite_match(keys: Tensor, merged: int, *, prefix: int = 1) -> Tensor:
    """Mean over heads, normalise, bmm, max, and two argsorts for who is among the best and where the others go."""
    unit = F.normalize(keys.mean(1), dim=-1)
    images, tokens, _ = unit.shape
    first_even, first_odd = prefix + prefix % 2, prefix + (prefix + 1) % 2
    best, match = (unit[:, first_even::2] @ unit[:, first_odd::2].transpose(1, 2)).max(-1)
    merges = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < merged
    slot = torch.empty(images, tokens, dtype=torch.int64, device=keys.device)
    slot[:, :prefix] = torch.arange(prefix, device=keys.device)
    first = prefix + best.shape[1] - merged
    slot[:, first_even::2] = torch.where(merges, first + match, prefix - 1 + (~merges).cumsum(1))
    slot[:, first_odd::2] = torch.arange(first, tokens - merged, device=keys.device)
    return slot


def class_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 1
) -> Tensor:
    """Only the class token's row of the attention map."""
    row = _logits(q[:, :, :1], k, size, scale).softmax(-1)
    return _patch_importance(row[:, :, 0], k.shape[2], prefix, "class")


def received_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 0
) -> Tensor:
    """The attention map and its mean over heads and queries."""
    attn = _logits(q, k, size, scale).softmax(-1)
    return _patch_importance(attn.mean((1, 2)), k.shape[2], prefix, "received")


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance_from: str = "class",
) -> tuple[Tensor, Tensor]:
    """Attention with an explicit map, from which the importance is read."""
    attn = _logits(q, k, size, scale).softmax(-1)
    return attn @ v, _patch_importance(attn, k.shape[2], prefix, importance_from)


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
) -> tuple[Tensor, Tensor]:
    """A softmax over what the masks let through, written out in float32: exponentials, their masked sum, a map."""
    epsilon, tokens, dtype = 1e-6, q.shape[2], v.dtype
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    logits = _logits(q, k, size, scale)
    exponentials = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    own = torch.eye(tokens, dtype=torch.bool, device=q.device)
    seen = exponentials * torch.where(own, 1, mask.to(q.dtype)[:, None, None])
    attn = (seen + epsilon / tokens) / (seen.sum(-1, keepdim=True) + epsilon)
    out, attn = (attn @ v).to(dtype), attn.detach()
    if importance_from == "class":
        return out, _patch_importance(attn[:, :, 0], tokens, prefix, importance_from)
    alive = mask.detach().to(attn.dtype)[:, None, :, None]
    received = (attn * alive).sum(2) / alive.sum(2).clamp_min(TINY)
    return out, _patch_importance(received, tokens, prefix, importance_from)


def compression_rate(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """All proxies and candidates at once: a product with a triangle of ones."""
    p = logits.softmax(-1)
    candidates = torch.arange(n_patches, 0, -granularity, device=logits.device)
    mean = (p * candidates).sum(-1)
    keeps = torch.arange(n_patches + prefix, device=logits.device) < candidates[:, None] + prefix
    return mean + (mean.ceil() - mean).detach() + prefix, p @ keeps.to(p.dtype)


def compression_rate_loop(
    logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """One proxy and one candidate after the other, as a module of its own in each block comes to be written."""
    kept, keep_prob = [], []
    for row in logits:
        p = row.softmax(-1)
        mean: Tensor = row.new_zeros(())
        keep: Tensor = row.new_zeros(n_patches + prefix)
        for index, candidate in enumerate(range(n_patches, 0, -granularity)):
            mask = torch.zeros_like(keep)
            mask[: candidate + prefix] = 1
            mean = mean + p[index] * candidate
            keep = keep + p[index] * mask
        kept.append(mean + (mean.ceil() - mean).detach() + prefix)
        keep_prob.append(keep)
    return torch.stack(kept), torch.stack(keep_prob)


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
    """Argsort, gathers of everything, bmm of what merges, and means by scatter_reduce."""
    order = _descending_order(_patch_importance(importance, x.shape[1], prefix, "class"), prefix)
    x, size, mask = _gather_rows(x, order), (_ones(x) if size is None else size).gather(1, order), mask.gather(1, order)
    position = torch.arange(x.shape[1], device=x.device)
    pruned, merged, last = int(kept_p), int(kept_m), int(mask[0].sum())
    middle = min(pruned, last)
    dst = position.repeat(len(x), 1)
    if pruned < last:
        mask = mask * (((position < pruned) | (position >= last)) + (prune_prob - prune_prob.detach()))
    if merged < middle:
        unit = F.normalize(x[:, prefix:middle].detach(), dim=-1)
        similarity = unit[:, merged - prefix :] @ unit[:, : merged - prefix].transpose(1, 2)
        cosine, match = similarity.max(dim=-1)
        dst[:, merged:middle] = match + prefix
        sources = size[:, merged:middle]
        gained = (sources * cosine if size_rule == "cosine" else sources).clamp_min(1)
        kept_size = size[:, :merged].clamp_min(1).scatter_add(1, match + prefix, gained.to(size.dtype))
        size = torch.cat([kept_size, gained.to(size.dtype), size[:, middle:]], dim=1)
        rows = (match + prefix).unsqueeze(-1).expand(-1, -1, x.shape[2])
        kept = x[:, :merged].scatter_reduce(1, rows, x[:, merged:middle], "mean")
        x = torch.cat([kept, x[:, merged:]], dim=1)
        mask = mask * (((position < merged) | (position >= middle)) + (merge_prob - merge_prob.detach()))
    return x, mask, size, order, dst
