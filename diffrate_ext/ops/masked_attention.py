from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..numeric import wide_dtype
from ._attention import check_class_token, check_fits_cuda_kernels, check_queries, check_values, empty_heads
from ._autograd import refuse_gradient, register_gradient, with_gradient
from ._checks import check_choice, check_wide_vector


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix: int = 1,
    importance_from: Literal["class", "received"] = "class",
    mask_gradient: Literal["derivative", "difference"] = "derivative",
) -> tuple[Tensor, Tensor]:
    """Attention of the search step, in which a masked token is visible only to itself.

    Attention masking, section 3 of the paper. With ``s_ij = scale * q_i . k_j + log size_j``,
    ``e_ij = exp(s_ij - max_l s_il)`` and ``P_ij = 1`` where ``i = j``, else ``M_j``:
    ``A_ij = (e_ij P_ij + eps/N) / (sum_l e_il P_il + eps)``, eps = 1e-6, and ``out_i = sum_j A_ij v_j``. Sums are
    float32 (float64 for float64 input). No N x N map exists, and the backward pass keeps the inputs alone.

    Args:
        q, k, v: (B, H, N, D); any strides. On CUDA D is at most 128, in float64 64.
        mask: M (B, N), 1 for tokens that are there, 0 for tokens that are not.
        size: token sizes (B, N); None stands for ones.
        scale: of the logits, by default ``D ** -0.5``.
        prefix: P.
        importance_from: ``"class"``, the class token's attention, or ``"received"``, the mean over the queries that are
            not masked.
        mask_gradient: of a masked token. ``"derivative"``, the paper's, weighs it with ``e_ij / Z_i``, where Z leaves
            it out: without bound where it would outshine all others. ``"difference"`` weighs it with
            ``e_ij / (Z_i + e_ij)``, the attention that it would get: what would change if it were there. Tokens that
            are there get the derivative.

    Returns:
        out (B, H, N, D) over (B, N, H, D) memory, and importance (B, N-P) float32 (float64 for float64 input).
        Gradients reach q, k, v and the mask, masked tokens included: what would change if they were there. Sizes and
        importance are constants.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device, or too many channels.
    """
    check_choice("importance_from", importance_from, ("class", "received"))
    check_choice("mask_gradient", mask_gradient, ("derivative", "difference"))
    size, scale, prefix = check_queries(q, k, size, scale, prefix)
    if importance_from == "class":
        check_class_token(prefix)
    check_values(v, q)
    check_fits_cuda_kernels(q)
    mask = check_wide_vector("mask", mask, q, "q", (q.shape[0], q.shape[2]))
    return with_gradient(
        torch.ops.diffrate.masked_attention.default, q, k, v, mask, size, scale, prefix, importance_from, mask_gradient
    )


@torch.library.register_fake("diffrate::masked_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None,
    scale: float,
    prefix: int = 1,
    importance_from: str = "class",
    mask_gradient: str = "derivative",
) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty((q.shape[0], q.shape[2] - prefix), dtype=wide_dtype(q))


@torch.library.register_fake("diffrate::masked_attention_backward")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    size: Tensor | None,
    scale: float,
    mask_gradient: str = "derivative",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(q), empty_heads(q), mask.new_empty(mask.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, size, ctx.scale, _, _, ctx.mask_gradient = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, mask, size)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    gradients = with_gradient(
        torch.ops.diffrate.masked_attention_backward.default, grad, *ctx.saved_tensors, ctx.scale, ctx.mask_gradient
    )
    return (*gradients, None, None, None, None, None)


register_gradient("masked_attention", _backward, _setup_context)
refuse_gradient("masked_attention_backward", "masked_attention cannot be differentiated twice")
