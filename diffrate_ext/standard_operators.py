"""An exported model in standard operators only, for ONNX and for runtimes without this library.

What stands here gives what the operators give, but for NaN. Tokens are picked with topk and gather, and added up with
products of matrices of ones and zeros: no scatter, which few runtimes do fast. Of equal numbers ONNX's TopK takes the
first, as the operators do; torch's own does not promise that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from . import ops  # noqa: F401  it loads the operators
from .errors import InputTypeError, InputValueError
from .numeric import TINY, wide_dtype
from .reference import attention_map, gather_tokens, token_importance


def to_standard_operators(program: ExportedProgram) -> ExportedProgram:
    """The same program without the operators of this library.

    It is for ``torch.onnx.export(to_standard_operators(program), dynamo=True).save("model.onnx")``, and for
    ``torch._inductor.aoti_compile_and_package``, whose package then runs without this library.

    Args:
        program: a compressed model in evaluation mode, exported by ``torch.export.export``.

    Returns:
        a new program, with the same inputs, outputs and dynamic shapes. It is slower in PyTorch than the one given.

    Raises:
        InputTypeError: it is not an exported program.
        InputValueError: a part of it computes attention with dropout, a causal mask or grouped queries.
    """
    if not isinstance(program, ExportedProgram):
        raise InputTypeError(f"expected what torch.export.export returns, got {type(program).__name__}")
    table = {getattr(torch.ops.diffrate, function.__name__).default: function for function in _FUNCTIONS}
    table[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    return program.run_decompositions(table)


def class_attention(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 1) -> Tensor:
    return token_importance(attention_map(q[:, :, :1], k, size, scale), prefix, "class", wide_dtype(q))


def received_attention(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 0) -> Tensor:
    return token_importance(attention_map(q, k, size, scale), prefix, "received", wide_dtype(q))


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    scale: float,
    prefix: int = 1,
    importance_from: str = "class",
) -> tuple[Tensor, Tensor]:
    weights = attention_map(q, k, size, scale)
    if importance_from == "class_rows":
        importance = weights[:, :, 0]
    else:
        importance = token_importance(weights, prefix, importance_from, weights.dtype)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous().transpose(1, 2), importance


def sort_tokens(
    x: Tensor, importance: Tensor, size: Tensor | None = None, prefix: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    patches = importance[:, importance.shape[1] - (x.shape[1] - prefix) :]
    order = _most_important(patches, x.shape[1], prefix)
    return gather_tokens(x, order), _sizes(x, size).gather(1, order), order


def prune_merge(
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
    if residual is not None:
        x = x + residual
    tokens, dtype = x.shape[1], wide_dtype(x)
    importance = token_importance(attn, prefix, importance_from, dtype)
    order = _most_important(importance, k_p, prefix)
    size = _sizes(x, size).gather(1, order)
    x = gather_tokens(x, order)
    target = torch.arange(k_p, device=x.device).expand_as(order)
    if k_m < k_p:
        into, sources = x[:, prefix:k_m].to(dtype), x[:, k_m:].to(dtype)
        cosine, match = (F.normalize(sources, dim=-1) @ F.normalize(into, dim=-1).transpose(1, 2)).max(-1)
        of_into, of_sources = size[:, prefix:k_m], size[:, k_m:]
        chosen = _one_hot(match, k_m - prefix, dtype)
        gained = chosen @ (of_sources * cosine if size_rule == "cosine" else of_sources)[..., None]
        weights = torch.ones_like(size) if mean_rule == "mean" else size.clamp_min(TINY)
        weights_into, chosen = weights[:, prefix:k_m, None], chosen * weights[:, None, k_m:]
        mean = (into * weights_into + chosen @ sources) / (weights_into + chosen.sum(-1, keepdim=True))
        x = torch.cat((x[:, :prefix], mean.to(x.dtype)), 1)
        size = torch.cat((size[:, :prefix], of_into + gained[..., 0]), 1)
        target = torch.cat((target[:, :k_m], match + prefix), 1)
    slot = torch.full((x.shape[0], tokens), -1, dtype=torch.int64, device=x.device).scatter(1, order, target)
    return x, size, slot


def prune_merge_norm(
    x: Tensor,
    attn: Tensor,
    k_p: int,
    k_m: int,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    norm_eps: float,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, size, slot = prune_merge(x, attn, k_p, k_m, *options)
    return out, size, slot, F.layer_norm(out, x.shape[2:], norm_weight, norm_bias, norm_eps)


def add_norm(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, x.shape[2:], norm_weight, norm_bias, norm_eps)


def merge_reduce(
    x: Tensor, dst: Tensor, kept: int, weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    if residual is not None:
        x = x + residual
    dtype = wide_dtype(x)
    shares = _one_hot(dst, kept, dtype)
    if weights is not None:
        shares = shares * weights.to(dtype)[:, None]
    total = shares.sum(-1, keepdim=True)
    filled = total != 0
    return torch.where(filled, shares @ x.to(dtype) / torch.where(filled, total, 1), 0).to(x.dtype)


def bipartite_match(keys: Tensor, merged: int, prefix: int = 1) -> Tensor:
    if keys.dim() == 4:
        keys = keys.mean(1)
    unit = F.normalize(keys.to(wide_dtype(keys)), dim=-1)
    even, odd = unit[:, prefix + prefix % 2 :: 2], unit[:, prefix + 1 - prefix % 2 :: 2]
    cosine, match = (even @ odd.transpose(1, 2)).max(-1)
    leaves = _one_hot(cosine.topk(merged).indices, even.shape[1], torch.int64).sum(-1)
    first_odd = prefix + even.shape[1] - merged
    of_even = torch.where(leaves > 0, match + first_odd, (1 - leaves).cumsum(1) + (prefix - 1))
    positions = torch.arange(first_odd + odd.shape[1], device=keys.device).expand(keys.shape[0], -1)
    of_odd = positions[:, first_odd:]
    one, other = (of_odd, of_even) if prefix % 2 else (of_even, of_odd)  # the first patch is one of `one`
    pairs = torch.stack((one[:, : other.shape[1]], other), 2).flatten(1)
    return torch.cat((positions[:, :prefix], pairs, one[:, other.shape[1] :]), 1)


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    class_attention,
    received_attention,
    proportional_attention,
    sort_tokens,
    prune_merge,
    prune_merge_norm,
    add_norm,
    merge_reduce,
    bipartite_match,
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention whose result lies in memory as the fused one's does, which the program's views go by."""
    if dropout_p or is_causal or enable_gqa:
        raise InputValueError("attention with dropout, a causal mask or grouped queries is not supported here")
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
    return (logits.softmax(-1) @ v).transpose(1, 2).contiguous().transpose(1, 2)


def _most_important(importance: Tensor, kept: int, prefix: int) -> Tensor:
    """Positions of the kept tokens (B, kept): the prefix, then patches by falling importance."""
    first = torch.arange(prefix, device=importance.device).expand(importance.shape[0], -1)
    return torch.cat((first, importance.topk(kept - prefix).indices + prefix), 1)


def _sizes(x: Tensor, size: Tensor | None) -> Tensor:
    dtype = wide_dtype(x)
    return torch.ones(x.shape[:2], dtype=dtype, device=x.device) if size is None else size.to(dtype)


def _one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(B, S) to (B, count, S): 1 where s goes."""
    return (index[:, None] == torch.arange(count, device=index.device)[:, None]).to(dtype)
