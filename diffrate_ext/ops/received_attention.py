from __future__ import annotations

import torch
from torch import Tensor

from ..numeric import wide_dtype
from ._attention import check_fits_cuda_kernels, check_queries
from ._checks import constant


def received_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, *, scale: float | None = None, prefix: int = 0
) -> Tensor:
    """The attention that each patch receives, mean over heads and queries, without the N x N map.

    The importance in models without a class token. Arguments, result and errors as in :func:`class_attention`;
    ``prefix`` may be 0. On CUDA a head has at most 128 channels, in float64 64.
    """
    size, scale, prefix = check_queries(q, k, size, scale, prefix)
    check_fits_cuda_kernels(q)
    return torch.ops.diffrate.received_attention(constant(q), constant(k), size, scale, prefix)


@torch.library.register_fake("diffrate::received_attention")
def _(q: Tensor, k: Tensor, size: Tensor | None, scale: float, prefix: int = 0) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2] - prefix), dtype=wide_dtype(q))
