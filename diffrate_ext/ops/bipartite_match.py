from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputValueError
from ._checks import check_int, check_prefix, check_tensor, constant


def bipartite_match(keys: Tensor, merged: int, *, prefix: int = 1) -> Tensor:
    """Which tokens merge into which by ToMe's bipartite soft matching (Bolya et al., ICLR 2023, section 3).

    Patches at even positions are matched with the most similar ones (cosine) at odd positions; the ``merged`` most
    similar pairs merge. Of equal ones the lowest position counts, and NaN is similar to nothing.

    Args:
        keys: what tokens are compared by: (B, N, D), or (B, H, N, D), of which the mean over heads counts, rounded to
            their dtype as ``keys.mean(1)`` is; any strides (timm's packed-qkv views are read in place). Not
            differentiable.
        merged: how many tokens merge: at most those at even positions after the prefix, and there must be one at an
            odd position to merge into.
        prefix: P. These tokens stay first, and neither merge nor are merged into.

    Returns:
        (B, N) int64, the output position of each token: the prefix, then what stays of the even positions in order,
        then the odd positions. Tokens with the same one merge: :func:`merge_reduce` takes it.

    Raises:
        InputValueError, InputTypeError: an argument has another shape or dtype, or ``merged`` is too large.
    """
    prefix = _check(keys, merged, prefix)
    return torch.ops.diffrate.bipartite_match(constant(keys), merged, prefix)


def _check(keys: Tensor, merged: int, prefix: int) -> int:
    check_tensor("keys", keys, (3, 4), "(B, N, D) or (B, H, N, D)")
    if keys.ndim == 4 and keys.shape[1] == 0:
        raise InputValueError(f"keys must have at least one head, got shape {tuple(keys.shape)}")
    tokens = keys.shape[-2]
    prefix = check_prefix(prefix, tokens)
    even, odd = (tokens + 1) // 2 - (prefix + 1) // 2, tokens // 2 - prefix // 2
    most = even if odd > 0 else 0
    if check_int("merged", merged, 0) > most:
        raise InputValueError(
            f"merged must be at most {most}, of {tokens} tokens with a prefix of {prefix}, got {merged}"
        )
    return prefix


@torch.library.register_fake("diffrate::bipartite_match")
def _(keys: Tensor, merged: int, prefix: int = 1) -> Tensor:
    _check(keys, merged, prefix)
    return keys.new_empty((keys.shape[0], keys.shape[-2]), dtype=torch.int64)
