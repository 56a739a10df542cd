"""The operators.

Notation: B images, N tokens of which the first P (``prefix``) are class and register tokens (the class token is index
0), C channels, H heads, D channels per head. All tensors are batch first; float32, float16, bfloat16, or float64.
Importances and sizes are float32 whatever the features are (float64 beside float64), because half-precision importances
tie and half-precision sizes lose sums. Results are deterministic. Wrong arguments raise ValueError or TypeError.

"The paper" is DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrate_ext import _autograd  # noqa: F401  registers fake kernels and gradients
from diffrate_ext._build import build_info
from diffrate_ext._checks import (
    check_choice,
    check_int,
    check_kept,
    check_like,
    check_prefix,
    check_shape,
    check_tensor,
    check_wide_vector,
    constant,
)
from diffrate_ext.reference import TINY, rate_candidates, wide_dtype

__all__ = [
    "class_attention",
    "compose_slots",
    "compression_rate",
    "masked_attention",
    "masked_prune_merge",
    "merge_reduce",
    "proportional_attention",
    "prune_merge",
    "received_attention",
    "restore_tokens",
    "sort_tokens",
]

_ops = torch.ops.diffrate
# where the CUDA kernels run: tests emulate them on the CPU
_cuda = "cpu" if "emulated" in build_info()["cuda_architectures"] else "cuda"


def sort_tokens(
    x: Tensor, importance: Tensor, size: Tensor | None = None, *, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens by descending importance, in one pass (section 3.2 of the paper).

    Prefix tokens stay first. Ties keep their order, NaN importance comes last.

    Args:
        x: features (B, N, C); any strides.
        importance: (B, N-P) of the patches, or (B, N), of which the prefix is ignored. Not differentiable.
        size: token sizes (B, N); None stands for ones.
        prefix: P.

    Returns:
        x (B, N, C) and size (B, N) in sorted order, and order (B, N) int64: the input position of each sorted position.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    prefix = check_prefix(prefix, x.shape[1])
    importance = _check_importance(importance, x, prefix)
    if size is not None:
        size = check_wide_vector("size", size, x, "x", (x.shape[0], x.shape[1]))
    return _ops.sort_tokens(x, importance, size, prefix)


def prune_merge(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    size: Tensor | None = None,
    *,
    prefix: int = 1,
    importance: str = "class",
    features: str = "mean",
    sizes: str = "cosine",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune the least important tokens, then merge the next ones into their most similar neighbours.

    Tokens are sorted by importance; the first ``k_p`` stay, the others are pruned; of those, the ones at sorted
    positions ``k_m .. k_p-1`` are merged, each into the token at positions ``P .. k_m-1`` with the most similar
    features (cosine; ties go to the lower position). Sections 3.2 and 3.3 of the paper.

    Args:
        x: features (B, N, C); any strides.
        attn: attention probabilities (B, H, N, N), their class rows (B, H, N), or importance (B, N) or (B, N-P).
        k_p: kept tokens after pruning, counting the prefix.
        k_m: kept tokens after merging: ``P+1 <= k_m < k_p <= N``, or ``P <= k_m = k_p <= N``.
        size: token sizes (B, N); None stands for ones.
        prefix: P.
        importance: how ``attn`` (B, H, N, N) becomes importance: ``"class"``, the class token's row, or ``"received"``,
            the mean over queries, for models without a class token. The mean over heads is taken in both.
        features: ``"mean"``, the plain mean of the merged tokens (the paper), or ``"weighted"``, weighted by size
            (ToMe).
        sizes: ``"cosine"``, a merged size counts times its cosine (the paper), or ``"sum"``.
        residual: (B, N, C), added to x on the way in.

    Returns:
        x (B, k_m, C) and size (B, k_m) in sorted order, and slot (B, N) int64: the output position that holds each
        input token, -1 = pruned. Gradients reach x and residual; sizes and the matching are constants.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    prefix = check_prefix(prefix, x.shape[1])
    check_kept(k_p, k_m, prefix, x.shape[1])
    check_choice("importance", importance, ("class", "received"))
    check_choice("features", features, ("mean", "weighted"))
    check_choice("sizes", sizes, ("cosine", "sum"))
    attn = _check_attention(attn, x, prefix, importance)
    if size is not None:
        size = check_wide_vector("size", size, x, "x", (x.shape[0], x.shape[1]))
    if residual is not None:
        check_tensor("residual", residual, 3, "(B, N, C)")
        check_shape("residual", residual, x.shape, "the shape of x")
        check_like("residual", residual, "x", x, dtype=False)
        if residual.dtype != x.dtype:  # as x + residual would: under autocast the two differ
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    return _ops.prune_merge(x, attn, k_p, k_m, size, prefix, importance, features, sizes, residual)


def merge_reduce(x: Tensor, dst: Tensor, kept: int, *, weights: Tensor | None = None) -> Tensor:
    """Mean of the tokens that share a destination: a scatter-mean in one pass, with its gradient.

    Args:
        x: features (B, N, C); any strides.
        dst: output position of each token, (B, N) int64, in ``-1 .. kept-1``; -1 goes nowhere.
        kept: number of output tokens.
        weights: (B, N), for a weighted mean; None stands for ones. A constant: no gradient reaches it.

    Returns:
        (B, kept, C). A position without tokens, or whose weights sum to zero, is zero.

    Raises:
        ValueError: also if ``dst`` is out of range. On CUDA such tokens go nowhere instead: looking would stop the
        stream.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    kept = check_int("kept", kept, 0)
    if not isinstance(dst, Tensor):
        raise TypeError(f"dst must be a tensor (B, N), got {type(dst).__name__}")
    if dst.dtype != torch.int64:
        raise TypeError(f"dst must be int64, got {dst.dtype}")
    check_shape("dst", dst, x.shape[:2], "(B, N)")
    check_like("dst", dst, "x", x, dtype=False)
    if weights is not None:
        weights = check_wide_vector("weights", weights, x, "x", (x.shape[0], x.shape[1]))
        if weights.requires_grad:
            raise ValueError("weights must not require a gradient (merge_reduce treats them as constants): detach them")
    _check_range("dst", dst, kept)
    return _ops.merge_reduce(x, dst, kept, weights)


def class_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 1
) -> Tensor:
    """The class token's attention to the patches, mean over heads, without the N x N map (section 3.2 of the paper).

    ``mean_h softmax_j(scale * q_cls . k_j + log size_j)``; sizes below the smallest normal float32 count as that.

    Args:
        q, k: (B, H, N, D); any strides (timm's packed-qkv views are read in place).
        size: token sizes (B, N); None stands for ones.
        scale: of the logits, by default ``D ** -0.5``.
        prefix: P, at least 1: index 0 is the class token.

    Returns:
        importance (B, N-P), float32. Not differentiable.
    """
    size, scale, prefix = _check_queries(q, k, size, scale, prefix)
    _check_class_token(prefix)
    return _ops.class_attention(constant(q), constant(k), size, scale, prefix)


def received_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 0
) -> Tensor:
    """The attention that each patch receives, mean over heads and queries, without the N x N map.

    The importance in models without a class token. Arguments and result as in :func:`class_attention`; ``prefix`` may
    be 0. On CUDA a head has at most 128 channels, in float64 64.
    """
    size, scale, prefix = _check_queries(q, k, size, scale, prefix)
    _check_width(q)
    return _ops.received_attention(constant(q), constant(k), size, scale, prefix)


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance: str | None = "class",
) -> tuple[Tensor, Tensor | None]:
    """Attention in which a token counts as often as it has tokens merged in, and the importance that follows from it.

    ``softmax(scale * q k^T + log size) v``. On CUDA, in half precision and without gradients, one kernel gives both.
    Elsewhere it is torch's fused attention with a bias on the keys, and the importance by its own kernel: on the CPU
    nothing faster was found. No N x N map exists.

    Args:
        q, k, v: (B, H, N, D); any strides.
        size: token sizes (B, N); None stands for ones.
        scale: of the logits, by default ``D ** -0.5``.
        prefix: P.
        importance: ``"class"``, ``"received"``, or None where it is not needed.

    Returns:
        out (B, H, N, D) over (B, N, H, D) memory, so that the transpose before the projection is free, and importance
        (B, N-P) float32, or None. Gradients reach q, k and v; sizes and importance are constants.
    """
    check_choice("importance", importance, ("class", "received", None))  # type: ignore[arg-type]
    size, scale, prefix = _check_queries(q, k, size, scale, prefix)
    check_tensor("v", v, 4, "(B, H, N, D)")
    check_shape("v", v, q.shape, "the shape of q")
    check_like("v", v, "q", q)
    if importance == "class":
        _check_class_token(prefix)
    if _has_own_attention(q, k, v):
        out, measured = _ops.proportional_attention(q, k, v, size, scale, prefix, importance or "none")
        return out, None if importance is None else measured
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_key_bias(size, q), scale=scale)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as it mostly is: a copy only if torch followed q's layout
    if importance is None:
        return out, None
    measure = class_attention if importance == "class" else received_attention
    return out, measure(q, k, size, scale=scale, prefix=prefix)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance: str = "class",
) -> tuple[Tensor, Tensor]:
    """Attention of the search step: masked tokens are seen by themselves alone (section 3.3 of the paper).

    With ``s_ij = scale * q_i . k_j + log size_j``, ``e_ij = exp(s_ij - max_l s_il)`` and ``P_ij = 1`` where ``i = j``,
    else ``M_j``: ``A_ij = (e_ij P_ij + eps/N) / (sum_l e_il P_il + eps)``, eps = 1e-6, and ``out_i = sum_j A_ij v_j``.
    Sums are float32 (float64 for float64 input). No N x N map exists, and the backward pass keeps the inputs alone.

    Args:
        q, k, v: (B, H, N, D); any strides. On CUDA D is at most 128, in float64 64.
        mask: M (B, N), 1 for tokens that are there, 0 for tokens that are not.
        size: token sizes (B, N); None stands for ones.
        scale: of the logits, by default ``D ** -0.5``.
        prefix: P.
        importance: ``"class"``, or ``"received"``: the mean over the queries that are not masked.

    Returns:
        out (B, H, N, D) over (B, N, H, D) memory, and importance (B, N-P), float32. Gradients reach q, k, v and the
        mask, masked tokens included: what would change if they were there. Sizes and importance are constants.
    """
    check_choice("importance", importance, ("class", "received"))
    size, scale, prefix = _check_queries(q, k, size, scale, prefix)
    if importance == "class":
        _check_class_token(prefix)
    check_tensor("v", v, 4, "(B, H, N, D)")
    check_shape("v", v, q.shape, "the shape of q")
    check_like("v", v, "q", q)
    _check_width(q)
    mask = check_wide_vector("mask", mask, q, "q", (q.shape[0], q.shape[2]))
    return _ops.masked_attention(q, k, v, mask, size, scale, prefix, importance)


def compression_rate(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Kept numbers and keep probabilities that the loss's gradient reaches (section 3.3 of the paper).

    Each proxy is a distribution ``p = softmax(logits)`` over the candidates ``c_k = n_patches - granularity * k``, as
    many as are positive.

    Args:
        logits: (L, K), one row for each proxy, one column for each candidate; float32 or float64.
        n_patches: patches before compression.
        granularity: the step between candidates.
        prefix: P.

    Returns:
        kept (L,), the tokens to keep, prefix included: ``ceil(sum_k c_k p_k) + P``, the ceiling with the gradient of
        what it rounds; and keep_probability (L, N), ``sum_k p_k [j < c_k + P]`` for sorted position j.
    """
    check_tensor("logits", logits, 2, "(L, K)")
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits must be float32 or float64, got {logits.dtype}")
    n_patches = check_int("n_patches", n_patches, 1)
    granularity = check_int("granularity", granularity, 1)
    prefix = check_int("prefix", prefix, 0)
    candidates = len(rate_candidates(n_patches, granularity))
    if logits.shape[1] != candidates:
        raise ValueError(
            f"logits must have one column for each of the {candidates} candidates (n_patches {n_patches}, granularity "
            f"{granularity}), got shape {tuple(logits.shape)}"
        )
    return _ops.compression_rate(logits, n_patches, granularity, prefix)


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
    sizes: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`prune_merge` in the search step: all tokens stay, and a mask says which are alive (paper, section 3.3).

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
        kept_p, kept_m: 0-d, as :func:`compression_rate` gives them. Constants here: their gradient is in the FLOPs. On
            CUDA they are read on the device: numbers that make no sense are not refused but raised until they do.
        prefix: P.
        sizes: ``"cosine"``, a source counts size times cosine but at least 1 (the paper), or ``"sum"``.

    Returns:
        x (B, N, C), mask (B, N) and size (B, N) in sorted order; order (B, N) int64, the input position of each sorted
        position; and dst (B, N) int64, the sorted position that each sorted token was merged into, or its own.
        Gradients reach x, mask, prune_prob and merge_prob; order, matching and sizes are constants.
    """
    check_tensor("x", x, 3, "(B, N, C)")
    images, tokens = x.shape[:2]
    prefix = check_prefix(prefix, tokens)
    check_choice("sizes", sizes, ("cosine", "sum"))
    importance = _check_importance(importance, x, prefix)
    mask = check_wide_vector("mask", mask, x, "x", (images, tokens))
    if size is not None:
        size = constant(check_wide_vector("size", size, x, "x", (images, tokens)))
    prune_prob = _check_rate("prune_prob", prune_prob, x, (tokens,), "(N,)")
    merge_prob = _check_rate("merge_prob", merge_prob, x, (tokens,), "(N,)")
    kept_p = _check_rate("kept_p", kept_p, x, (), "0-d").detach()
    kept_m = _check_rate("kept_m", kept_m, x, (), "0-d").detach()
    if images and x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_masked_kept(mask, kept_p, kept_m, prefix)
    return _ops.masked_prune_merge(x, mask, importance, size, prune_prob, merge_prob, kept_p, kept_m, prefix, sizes)


def compose_slots(first: Tensor, second: Tensor) -> Tensor:
    """Where tokens end up after two compressions in a row.

    Args:
        first: slots (B, N) of the first one, as :func:`prune_merge` returns them.
        second: slots (B, K) of the second, whose input is the first one's output.

    Returns:
        slots (B, N): ``second[first]``, -1 for what either of them pruned.
    """
    for name, slot in (("first", first), ("second", second)):
        _check_slot(name, slot)
    check_like("second", second, "first", first)
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"first and second must have one batch size, got {first.shape[0]} and {second.shape[0]}")
    _check_range("first", first, second.shape[1])
    if second.shape[1] == 0:  # nothing was left to compress
        return torch.full_like(first, -1)
    through = second.gather(1, first.clamp_min(0))
    return torch.where(first < 0, -1, through)


def restore_tokens(x: Tensor, slot: Tensor, fill: Tensor | None = None) -> Tensor:
    """Tokens back in their places: every place gets the token that absorbed it. Differentiable in x and fill.

    Args:
        x: features (B, K, C) of the kept tokens.
        slot: (B, N) int64, as :func:`prune_merge` and :func:`compose_slots` return them.
        fill: (C,), what pruned places get; None stands for zeros.

    Returns:
        (B, N, C).
    """
    check_tensor("x", x, 3, "(B, K, C)")
    _check_slot("slot", slot)
    check_like("slot", slot, "x", x, dtype=False)
    if slot.shape[0] != x.shape[0]:
        raise ValueError(f"slot must have the batch size of x, {x.shape[0]}, got {slot.shape[0]}")
    _check_range("slot", slot, x.shape[1])
    if fill is None:
        fill = x.new_zeros(x.shape[2])
    else:
        check_tensor("fill", fill, 1, "(C,)")
        check_shape("fill", fill, x.shape[2:], "(C,)")
        check_like("fill", fill, "x", x)
    if x.shape[1] == 0:
        return fill.expand(*slot.shape, -1)
    restored = x.gather(1, slot.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.where((slot < 0).unsqueeze(-1), fill, restored)


def _check_rate(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...], meaning: str) -> Tensor:
    check_tensor(name, value, len(shape), meaning)
    check_shape(name, value, shape, meaning)
    check_like(name, value, "x", x, dtype=False)
    return value.to(wide_dtype(x))


def _check_masked_kept(mask: Tensor, kept_p: Tensor, kept_m: Tensor, prefix: int) -> None:
    """Looked at on the CPU only, elsewhere looking would stop the stream."""
    alive, pruned, merged = (float(number) for number in (mask.detach()[0].sum(), kept_p, kept_m))
    if not 0 <= alive <= mask.shape[1]:
        raise ValueError(f"mask must lie in 0 .. 1, but its first row adds up to {alive}")
    if not pruned >= prefix:
        raise ValueError(f"kept_p must be at least the prefix, {prefix}, got {pruned:g}")
    if not (merged >= min(alive, pruned) or merged >= prefix + 1):
        raise ValueError(
            f"kept_m must be at least {prefix + 1} (the prefix and one token to merge into), got {merged:g}"
        )


def _check_slot(name: str, slot: object) -> None:
    if not isinstance(slot, Tensor):
        raise TypeError(f"{name} must be a tensor (B, N), got {type(slot).__name__}")
    if slot.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {slot.dtype}")
    if slot.ndim != 2:
        raise ValueError(f"{name} must be (B, N), got shape {tuple(slot.shape)}")


def _check_range(name: str, positions: Tensor, count: int) -> None:
    """Positions must lie in -1 .. count-1; looked at on the CPU only, elsewhere looking would stop the stream."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
        return
    low, high = (int(end) for end in positions.aminmax())
    if low < -1 or high >= count:
        raise ValueError(f"{name} must lie in -1 .. {count - 1}, got values from {low} to {high}")


def _check_importance(importance: Tensor, x: Tensor, prefix: int) -> Tensor:
    check_tensor("importance", importance, 2, "(B, N-P) or (B, N)")
    images, tokens = x.shape[:2]
    if tuple(importance.shape) not in ((images, tokens - prefix), (images, tokens)):
        raise ValueError(
            f"importance must be (B, N-P) = {(images, tokens - prefix)} or (B, N) = {(images, tokens)}, "
            f"got shape {tuple(importance.shape)}"
        )
    check_like("importance", importance, "x", x, dtype=False)
    return constant(importance)


def _check_attention(attn: Tensor, x: Tensor, prefix: int, importance: str) -> Tensor:
    meaning = "(B, H, N, N), its class rows (B, H, N), or importance (B, N) or (B, N-P)"
    check_tensor("attn", attn, (2, 3, 4), meaning)
    if attn.ndim == 2:
        return _check_importance(attn, x, prefix)
    images, tokens = x.shape[:2]
    check_shape("attn", attn, (images, attn.shape[1], *[tokens] * (attn.ndim - 2)), "(B, H, N, N) or (B, H, N)")
    if attn.shape[1] == 0:
        raise ValueError(f"attn must have at least one head, got shape {tuple(attn.shape)}")
    if attn.ndim == 4 and importance == "class" and prefix == 0:
        raise ValueError(
            "importance='class' needs a class token (prefix >= 1), got prefix 0; use importance='received'"
        )
    check_like("attn", attn, "x", x, dtype=False)
    return constant(attn)


def _check_queries(
    q: Tensor, k: Tensor, size: Tensor | None, scale: float | None, prefix: int
) -> tuple[Tensor | None, float, int]:
    check_tensor("q", q, 4, "(B, H, N, D)")
    check_tensor("k", k, 4, "(B, H, N, D)")
    check_shape("k", k, q.shape, "the shape of q")
    check_like("k", k, "q", q)
    for dimension, name in ((1, "head"), (2, "token"), (3, "channel")):
        if q.shape[dimension] == 0:
            raise ValueError(f"q must have at least one {name}, got shape {tuple(q.shape)}")
    prefix = check_prefix(prefix, q.shape[2])
    if size is not None:
        size = constant(check_wide_vector("size", size, q, "q", (q.shape[0], q.shape[2])))
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    return size, float(q.shape[3] ** -0.5 if scale is None else scale), prefix


def _check_width(q: Tensor) -> None:
    """Of what the CUDA kernels keep in shared memory."""
    widest = 64 if q.dtype == torch.float64 else 128
    if q.device.type == _cuda and q.shape[3] > widest:
        raise ValueError(
            f"q must have at most {widest} channels per head on CUDA in {q.dtype}, got shape {tuple(q.shape)}"
        )


def _check_class_token(prefix: int) -> None:
    if prefix < 1:
        raise ValueError(
            "prefix must be at least 1 (index 0 is the class token), got 0; without one: received_attention, or "
            "importance='received'"
        )


def _has_own_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    differentiates = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (
        q.device.type == _cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] <= 128
        and not differentiates
    )


def _key_bias(size: Tensor | None, q: Tensor) -> Tensor | None:
    """log(size) as an additive mask (B, 1, 1, N) for fused attention."""
    if size is None:
        return None
    bias = size.clamp_min(TINY).log()[:, None, None, :]
    # on the CPU a float32 bias beside half-precision queries is as fast, and keeps its digits
    return bias if q.device.type == "cpu" else bias.to(q.dtype)
