"""Operators that have no CUDA kernel yet, on CUDA: plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffrate_ext import reference
from diffrate_ext.reference import MASKED_EPSILON, TINY, wide_dtype


def class_attention(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 1) -> Tensor:
    return _logits(q[:, :, :1], k, size, scale).softmax(-1).mean((1, 2))[:, prefix:].contiguous()


def received_attention(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 0) -> Tensor:
    # a few queries at a time: no N x N map
    total = sum(_logits(some, k, size, scale).softmax(-1).sum((1, 2)) for some in q.split(64, dim=2))
    return (total / (q.shape[1] * q.shape[2]))[:, prefix:].contiguous()  # type: ignore[index,operator,union-attr]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None,
    scale: float,
    prefix: int = 1,
    importance: str = "class",
) -> tuple[Tensor, Tensor]:
    out, measured = reference.masked_attention(q, k, v, mask, size, scale=scale, prefix=prefix, importance=importance)
    return out.transpose(1, 2).contiguous().transpose(1, 2), measured.contiguous()


def masked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, dtype = q.shape[2], wide_dtype(q)
    grad, (wide_q, wide_k, wide_v) = grad.to(dtype), (t.to(dtype) for t in (q, k, v))
    logits = _logits(q, k, size, scale)
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    other = 1 - torch.eye(tokens, dtype=dtype, device=q.device)
    seen = e * (1 - (1 - mask[:, None, None]) * other)
    total = seen.sum(-1, keepdim=True) + MASKED_EPSILON
    attn = (seen + MASKED_EPSILON / tokens) / total
    to_attn = grad @ wide_v.transpose(-1, -2)
    centred = (to_attn - (attn * to_attn).sum(-1, keepdim=True)) / total
    to_logits = seen * centred * scale
    gradients = (to_logits @ wide_k, to_logits.transpose(-1, -2) @ wide_q, attn.transpose(-1, -2) @ grad)
    to_q, to_k, to_v = (g.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for g in gradients)
    return to_q, to_k, to_v, (e * centred * other).sum((1, 2))


def compression_rate(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    return reference.compression_rate(logits, n_patches, granularity, prefix)


def compression_rate_backward(
    grad_kept: Tensor, grad_keep_prob: Tensor, logits: Tensor, n_patches: int, granularity: int, prefix: int
) -> Tensor:
    p = logits.double().softmax(-1)
    candidates = torch.tensor(reference.rate_candidates(n_patches, granularity), device=logits.device)
    below = torch.nn.functional.pad(grad_keep_prob.double().cumsum(-1), (1, 0))
    gradient = below[:, candidates + prefix] + grad_kept.double()[:, None] * candidates
    return (p * (gradient - (p * gradient).sum(-1, keepdim=True))).to(logits.dtype)


def masked_prune_merge(
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
    # it reads the kept numbers on the host, which waits for the stream
    return reference.masked_prune_merge(
        x, mask, importance, size, prune_prob, merge_prob, kept_p, kept_m, prefix=prefix, sizes=sizes
    )


def _logits(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    logits = (q.to(wide_dtype(q)) @ k.to(wide_dtype(k)).transpose(-1, -2)) * scale
    return logits if size is None else logits + size.clamp_min(TINY).log()[:, None, None]


ALL = (
    class_attention,
    received_attention,
    masked_attention,
    masked_attention_backward,
    compression_rate,
    compression_rate_backward,
    masked_prune_merge,
)


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator computes in the dtype of its arguments, whatever surrounds it."""

    @functools.wraps(operator)
    def call(*arguments: Any) -> Any:
        with torch.autocast("cuda", enabled=False):
            return operator(*arguments)

    return call


for operator in ALL:
    torch.library.impl(f"diffrate::{operator.__name__}", "cuda", _without_autocast(operator))
