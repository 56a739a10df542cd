from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputValueError
from ..numeric import wide_dtype
from ._checks import check_int, check_prefix, check_tensor, constant


def bipartite_match(keys: Tensor, merged: int, *, prefix: int = 1) -> Tensor:
    """Which tokens merge into which by ToMe's bipartite soft matching (Bolya et al., ICLR 2023, section 3).

    Patches at even positions are matched with the most similar ones (cosine) at odd positions; the ``merged`` most
    similar pairs merge. Of equal ones the lowest position counts.

    Args:
        keys: what tokens are compared by (B, N, D), as a rule the mean of the keys over heads. Not differentiable.
        merged: how many tokens merge: at most those at even positions after the prefix, and there must be one at an
            odd position to merge into.
        prefix: P. These tokens stay first, and neither merge nor are merged into.

    Returns:
        (B, N) int64, the output position of each token: the prefix, then what stays of the even positions in order,
        then the odd positions. Tokens with the same one merge: :func:`merge_reduce` takes it.

    Raises:
        InputValueError, InputTypeError: an argument has another shape or dtype, or ``merged`` is too large.
    """
    check_tensor("keys", keys, 3, "(B, N, D)")
    images, tokens, _ = keys.shape
    prefix = check_prefix(prefix, tokens)
    positions = torch.arange(tokens, device=keys.device)
    even, odd = positions[prefix + prefix % 2 :: 2], positions[prefix + (prefix + 1) % 2 :: 2]
    most = len(even) if len(odd) else 0
    if check_int("merged", merged, 0) > most:
        raise InputValueError(
            f"merged must be at most {most}, of {tokens} tokens with a prefix of {prefix}, got {merged}"
        )
    if len(odd) == 0:  # there is one patch at most
        return positions.repeat(images, 1)

    unit = F.normalize(constant(keys).to(wide_dtype(keys)), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):  # which would round the cosines
        cosine = unit[:, even] @ unit[:, odd].transpose(1, 2)
    best, destination = cosine.nan_to_num(nan=-torch.inf).max(-1)  # NaN is similar to nothing
    order = best.argsort(dim=-1, descending=True, stable=True)
    stays = order.argsort(dim=-1) >= merged  # by rank
    first_odd = prefix + len(even) - merged
    from_even = torch.where(stays, prefix - 1 + stays.cumsum(1), first_odd + destination)
    from_odd = (first_odd + torch.arange(len(odd), device=keys.device)).expand(images, -1)
    by_parity = torch.cat([positions[:prefix].expand(images, -1), from_even, from_odd], dim=1)
    return by_parity[:, torch.cat([positions[:prefix], even, odd]).argsort()]
