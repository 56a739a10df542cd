"""Numbers that the operators, their reference and the models share."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32. Cosine-weighted merging can drive a size to zero or below; its logarithm must stay
finite."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of importances and sizes beside ``x``: half precision would tie importances and lose sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rate_candidates(n_patches: int, granularity: int) -> list[int]:
    """The numbers of patches that a block may keep: ``n_patches - granularity * k`` while positive."""
    return list(range(n_patches, 0, -granularity))
