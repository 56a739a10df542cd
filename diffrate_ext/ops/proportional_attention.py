from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modes import in_forward_mode
from ..numeric import TINY, wide_dtype
from . import _attention
from ._attention import check_class_token, check_queries, check_values, empty_heads, fits_cuda_kernels
from ._autograd import refuse_gradient, refuse_tangents
from ._call import REFUSED, call, needs_gradient
from ._checks import check_choice, constant
from .class_attention import class_attention
from .received_attention import received_attention


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance_from: Literal["class", "class_rows", "received"] | None = "class",
) -> tuple[Tensor, Tensor | None]:
    """Attention that weights each token by its size, and the importance derived from it.

    ``softmax(scale * q k^T + log size) v``. On CUDA, in half precision and without gradients, one kernel gives both.
    Elsewhere it is torch's fused attention with a bias on the keys, and the importance by its own kernel: on the CPU
    nothing faster was found. No N x N map exists.

    Args:
        q, k, v: (B, H, N, D); any strides.
        size: token sizes (B, N); None stands for ones.
        scale: of the logits, by default ``D ** -0.5``.
        prefix: P.
        importance_from: ``"class"``, the class token's attention, ``"received"``, the mean over queries, or None where
            no importance is needed. ``"class_rows"`` is the class token's attention of each head, to all tokens:
            :func:`prune_merge` takes it as it is. On CUDA that saves the launch which averages.

    Returns:
        out (B, H, N, D) over (B, N, H, D) memory, so that the transpose before the projection is free, and importance
        (B, N-P), class rows (B, H, N) or None. Importance is float32 (float64 for float64 input). Gradients reach q, k
        and v; sizes and importance are constants.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device.
    """
    refused: Exception | None = None
    try:
        if has_kernel(q, k, v):
            if not _are_plain(size, scale, prefix, importance_from):
                size, scale, prefix = _check(q, k, v, size, scale, prefix, importance_from)
            arguments = (q, k, v, size, q.shape[3] ** -0.5 if scale is None else scale, prefix)
            operator = torch.ops.diffrate.proportional_attention.default
            out, importance = call(operator, (*arguments, "none" if importance_from is None else importance_from))
            return out, None if importance_from is None else importance
    except REFUSED as error:
        refused = error
    size, scale, prefix = _check(q, k, v, size, scale, prefix, importance_from)
    if refused is not None:
        raise refused
    if in_forward_mode():
        refuse_tangents(q, k, v)
    out = _fused_attention(q, k, v, _key_bias(size, q), scale)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as it mostly is: a copy only if torch followed q's layout
    if importance_from is None:
        return out, None
    if importance_from == "class_rows":
        return out, class_rows(constant(q), constant(k), size, scale)
    measure = class_attention if importance_from == "class" else received_attention
    return out, measure(q, k, size, scale=scale, prefix=prefix)


def has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether one kernel gives attention and importance. Elsewhere class rows take longer than their mean."""
    return (
        q.device.type == _attention.CUDA
        and q.dtype in (torch.float16, torch.bfloat16)
        and fits_cuda_kernels(q)
        and not needs_gradient(q, k, v)
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    scale: float | None,
    prefix: int,
    importance_from: str | None,
) -> tuple[Tensor | None, float, int]:
    """Size, scale and prefix as kernels take them."""
    check_choice("importance_from", importance_from, ("class", "class_rows", "received", None))
    checked = check_queries(q, k, size, scale, prefix)
    check_values(v, q)
    if importance_from in ("class", "class_rows"):
        check_class_token(prefix)
    return checked


def _are_plain(size: Tensor | None, scale: float | None, prefix: int, importance_from: str | None) -> bool:
    """Whether the operator takes these as they are, and checks them as :func:`_check` does."""
    return (
        (size is None or size.dtype == torch.float32)
        and type(scale) in (float, type(None))
        and type(prefix) is int
        and (prefix >= 1 or importance_from not in ("class", "class_rows"))
    )


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """torch's fused attention, around two faults that torch 2.11 has with gradients on CUDA."""
    if not torch.compiler.is_compiling() and q.numel() == 0:  # None comes back
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v
    if scale < 0:  # gradients become NaN
        q, scale = -q, -scale
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def class_rows(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """The class token's attention, (B, H, N). Not by a matrix product: autocast would round it to half precision."""
    logits = (q[:, :, :1].to(wide_dtype(q)) * k).sum(-1) * scale
    if size is not None:
        logits = logits + size.clamp_min(TINY).log()[:, None]
    return logits.softmax(-1)


def _key_bias(size: Tensor | None, q: Tensor) -> Tensor | None:
    """log(size) as an additive mask (B, 1, 1, N) for fused attention."""
    if size is None:
        return None
    bias = size.clamp_min(TINY).log()[:, None, None, :]
    # on the CPU a float32 bias beside half-precision queries is as fast, and keeps its digits
    return bias if q.device.type == "cpu" else bias.to(q.dtype)


@torch.library.register_fake("diffrate::proportional_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float, prefix: int = 1, importance_from: str = "class"
) -> tuple[Tensor, Tensor]:
    check_queries(q, k, size, scale, prefix)
    check_values(v, q)
    images, heads, tokens, _ = q.shape
    shape = (images, heads, tokens) if importance_from == "class_rows" else (images, tokens - prefix)
    if importance_from == "none":
        shape = (images, 0)
    return empty_heads(q), q.new_empty(shape, dtype=wide_dtype(q))


refuse_gradient(
    "proportional_attention",
    "torch.ops.diffrate.proportional_attention has no gradient; diffrate_ext.ops.proportional_attention has",
)
