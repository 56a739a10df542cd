"""Whether the matches of prune_merge and masked_prune_merge are right."""

from __future__ import annotations

import torch
from compare import assert_same
from oracles import cosines
from strategies import TokenCase
from torch import Tensor


def check_matches(case: TokenCase, sorted_x: Tensor, match: Tensor, k_m: int) -> None:
    """Each source, at the sorted positions k_m .., goes to a destination within rounding of its best.

    Of destinations that are equal bit for bit it goes to the first. What is similar to nothing goes to the first of
    all.

    Args:
        sorted_x: features (B, N, C) in sorted order, after any residual.
        match: destinations (B, sources).
    """
    if match.numel() == 0:
        return
    assert int(match.min()) >= case.prefix
    assert int(match.max()) < k_m
    table = cosines(sorted_x)[:, k_m : k_m + match.shape[1], case.prefix : k_m]
    table = table.nan_to_num(nan=-torch.inf)  # a NaN is similar to nothing, and equally so to every destination
    found = table.gather(2, (match - case.prefix)[..., None]).squeeze(-1)
    best = table.max(2).values
    # a dot product of n products is off by at most n eps |u| |v|; few more roundings make it a cosine; two are compared
    rounding = 2 * (case.channels + 6) * torch.finfo(case.wide).eps
    missed = torch.where(best.isinf(), 0.0, best - found)
    assert float(missed.max()) <= rounding, f"a destination less similar by {float(missed.max()):.3e} was chosen"
    nothing_similar = best.isinf()
    assert_same(
        "match of what is similar to nothing", match[nothing_similar], match[nothing_similar].mul(0) + case.prefix
    )
    first = first_of_equals(sorted_x[:, case.prefix : k_m]).gather(1, match - case.prefix) + case.prefix
    assert_same("match among destinations that are equal bit for bit", match, first)


def first_of_equals(rows: Tensor) -> Tensor:
    """The first position (B, K) in its image that holds the bits of each row, for rows (B, K, C)."""
    positions = []
    for image in rows.contiguous().view(torch.uint8).numpy():
        first: dict[bytes, int] = {}
        positions.append([first.setdefault(row.tobytes(), position) for position, row in enumerate(image)])
    return torch.tensor(positions, dtype=torch.int64).view(rows.shape[:2])
