from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputTypeError, InputValueError
from ..numeric import rate_candidates
from ._autograd import refuse_gradient, register_gradient, with_gradient
from ._checks import check_int, check_tensor


def compression_rate(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Kept numbers and keep probabilities that the loss's gradient reaches.

    The compression rate re-parameterization of the paper (section 3). Each proxy is a distribution
    ``p = softmax(logits)`` over the candidates ``c_k = n_patches - granularity * k``, as many as are positive.

    Args:
        logits: (L, K), one row for each proxy, one column for each candidate; float32 or float64.
        n_patches: patches before compression.
        granularity: the step between candidates.
        prefix: P.

    Returns:
        kept (L,), the tokens to keep, prefix included: ``ceil(sum_k c_k p_k) + P``, with a straight-through
        gradient; and keep_probability (L, N), ``sum_k p_k [j < c_k + P]`` for sorted position j.

    Raises:
        InputValueError, InputTypeError: ``logits`` has another dtype, or not one column for each candidate.
    """
    check_tensor("logits", logits, 2, "(L, K)")
    if logits.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"logits must be float32 or float64, got {logits.dtype}")
    n_patches = check_int("n_patches", n_patches, 1)
    granularity = check_int("granularity", granularity, 1)
    prefix = check_int("prefix", prefix, 0)
    candidates = len(rate_candidates(n_patches, granularity))
    if logits.shape[1] != candidates:
        raise InputValueError(
            f"logits must have one column for each of the {candidates} candidates (n_patches {n_patches}, granularity "
            f"{granularity}), got shape {tuple(logits.shape)}"
        )
    return with_gradient(torch.ops.diffrate.compression_rate.default, logits, n_patches, granularity, prefix)


@torch.library.register_fake("diffrate::compression_rate")
def _(logits: Tensor, n_patches: int, granularity: int = 1, prefix: int = 1) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0], n_patches + prefix)


@torch.library.register_fake("diffrate::compression_rate_backward")
def _(
    grad_kept: Tensor, grad_keep_prob: Tensor, logits: Tensor, n_patches: int, granularity: int, prefix: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ctx.n_patches, ctx.granularity, ctx.prefix = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad_kept: Tensor, grad_keep_prob: Tensor) -> tuple:
    (logits,) = ctx.saved_tensors
    arguments = (grad_kept, grad_keep_prob, logits, ctx.n_patches, ctx.granularity, ctx.prefix)
    return with_gradient(torch.ops.diffrate.compression_rate_backward.default, *arguments), None, None, None


register_gradient("compression_rate", _backward, _setup_context)
refuse_gradient("compression_rate_backward", "compression_rate cannot be differentiated twice")
