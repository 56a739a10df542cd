"""Pooling over tokens that count for their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numeric import wide_dtype


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """Tokens (B, K, C) with sizes (B, K) to their mean (B, C)."""
    weight = (size / size.detach().sum(1, keepdim=True)).to(x.dtype)
    return (weight[:, None] @ x).squeeze(1)


def without_masked(x: Tensor, size: Tensor) -> Tensor:
    """For a maximum over tokens (B, K, C): those of size 0 are no candidates."""
    return x.masked_fill((size == 0)[..., None], -torch.inf)


def attention_pool(pool: Any, x: Tensor, size: Tensor) -> Tensor:
    """Tokens (B, K, C) with sizes (B, K) by timm's AttentionPoolLatent to (B, C)."""
    if size.requires_grad:
        return _masked_attention_pool(pool, x, size)
    pooled: Tensor = pool(x, attn_mask=size.log()[:, None, None].to(x.dtype))
    return pooled


def _masked_attention_pool(pool: Any, x: Tensor, size: Tensor) -> Tensor:
    """timm's attention pooling over tokens that count for their sizes, differentiable where a size is 0."""
    latent = pool.latent.expand(x.shape[0], -1, -1)
    q = pool.q_norm(pool.q(latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2))
    k, v = pool.kv(x).unflatten(2, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
    pooled = masked_attention_to(q, pool.k_norm(k), v, size, pool.scale)
    x = pool.proj_drop(pool.proj(pooled.transpose(1, 2).flatten(2)))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    return x.mean(1) if pool.pool == "avg" else x[:, 0] if pool.pool == "token" else x


def masked_attention_to(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    """Attention (B, H, Q, D) of some queries to tokens (B, H, K, D) of these sizes (B, K), differentiable at size 0."""
    logits = q @ k.transpose(-1, -2) * scale
    logits = logits.to(wide_dtype(logits))
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp() * size[:, None, None]
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v
