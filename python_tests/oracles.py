"""What the operators must do, in other words than ``diffrate_ext.reference``: loops over plain numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sorted_positions(importance: Tensor, prefix: int) -> Tensor:
    """Input position of each sorted position (B, N), for the patches' importance (B, N-P)."""

    def order(values: list[float]) -> list[int]:
        # Python's sort is stable, and compares -0.0 and 0.0 as equal
        return sorted(
            range(len(values)), key=lambda j: (math.isnan(values[j]), 0.0 if math.isnan(values[j]) else -values[j])
        )

    rows = [[*range(prefix), *(j + prefix for j in order(row))] for row in importance.cpu().double().tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(importance.shape[0], prefix + importance.shape[1])


def cosines(x: Tensor) -> Tensor:
    """Cosine of every pair of tokens in float64, (B, N, N); a norm counts as at least 1e-12."""
    x = x.double()
    unit = x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return unit @ unit.transpose(1, 2)
