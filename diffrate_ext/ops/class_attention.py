from __future__ import annotations

import torch
from torch import Tensor

from ..numeric import wide_dtype
from ._attention import check_class_token, check_queries
from ._checks import constant


def class_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 1
) -> Tensor:
    """The class token's attention to the patches, mean over heads, without the N x N map.

    ``mean_h softmax_j(scale * q_cls . k_j + log size_j)``; sizes below the smallest normal float32 count as that.
    The importance in token sorting, section 3 of the paper.

    Args:
        q, k: (B, H, N, D); any strides (timm's packed-qkv views are read in place).
        size: token sizes (B, N); None stands for ones.
        scale: of the logits, by default ``D ** -0.5``.
        prefix: P, at least 1: index 0 is the class token.

    Returns:
        importance (B, N-P), float32 (float64 for float64 input). Not differentiable.

    Raises:
        InputValueError, InputTypeError: an argument has another shape, dtype or device, or ``prefix`` is 0.
    """
    size, scale, prefix = check_queries(q, k, size, scale, prefix)
    check_class_token(prefix)
    return torch.ops.diffrate.class_attention(constant(q), constant(k), size, scale, prefix)


@torch.library.register_fake("diffrate::class_attention")
def _(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 1) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2] - prefix), dtype=wide_dtype(q))
