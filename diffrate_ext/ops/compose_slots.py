from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputValueError
from ._checks import check_like, check_range, check_slot


def compose_slots(first: Tensor, second: Tensor) -> Tensor:
    """Where tokens end up after two compressions in a row.

    Args:
        first: slots (B, N) of the first one, as :func:`prune_merge` returns them.
        second: slots (B, K) of the second, whose input is the first one's output.

    Returns:
        slots (B, N): ``second[first]``, -1 for what either of them pruned.
    """
    for name, slot in (("first", first), ("second", second)):
        check_slot(name, slot)
    check_like("second", second, "first", first)
    if first.shape[0] != second.shape[0]:
        raise InputValueError(f"first and second must have one batch size, got {first.shape[0]} and {second.shape[0]}")
    check_range("first", first, second.shape[1])
    if second.shape[1] == 0:  # nothing was left to compress
        return torch.full_like(first, -1)
    through = second.gather(1, first.clamp_min(0))
    return torch.where(first < 0, -1, through)
