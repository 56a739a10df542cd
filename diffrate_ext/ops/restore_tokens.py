from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputValueError
from ._checks import check_like, check_range, check_shape, check_slot, check_tensor


def restore_tokens(x: Tensor, slot: Tensor, fill: Tensor | None = None) -> Tensor:
    """Tokens back in their places: every place gets the token that absorbed it. Differentiable in x and fill.

    Args:
        x: features (B, K, C) of the kept tokens.
        slot: (B, N) int64, as :func:`prune_merge` and :func:`compose_slots` return them.
        fill: what pruned places get, (C,) or one for each place, (B, N, C); None stands for zeros.

    Returns:
        (B, N, C).
    """
    check_tensor("x", x, 3, "(B, K, C)")
    check_slot("slot", slot)
    check_like("slot", slot, "x", x, dtype=False)
    if slot.shape[0] != x.shape[0]:
        raise InputValueError(f"slot must have the batch size of x, {x.shape[0]}, got {slot.shape[0]}")
    check_range("slot", slot, x.shape[1])
    if fill is None:
        fill = x.new_zeros(x.shape[2])
    else:
        by_place = isinstance(fill, Tensor) and fill.dim() == 3
        shape = "(B, N, C)" if by_place else "(C,)"
        check_tensor("fill", fill, 3 if by_place else 1, shape)
        check_shape("fill", fill, (*slot.shape, x.shape[2]) if by_place else x.shape[2:], shape)
        check_like("fill", fill, "x", x)
    if x.shape[1] == 0:
        return fill.expand(*slot.shape, -1)
    restored = x.gather(1, slot.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.where((slot < 0).unsqueeze(-1), fill, restored)
