"""Whether the matches of prune_merge, masked_prune_merge and bipartite_match are right."""

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


def check_bipartite_match(keys: Tensor, slot: Tensor, merged: int, prefix: int, rounding: float, bits: bool) -> None:
    """ToMe's matching of keys (B, N, D): the most similar sources merge, each into its most similar destination.

    Args:
        rounding: what cosines may be off by.
        bits: the keys are what was compared, bit by bit: of equal sources, and of equal destinations, the first counts.
    """
    tokens = keys.shape[1]
    even, odd = (torch.arange(prefix, tokens)[torch.arange(prefix, tokens) % 2 == parity] for parity in (0, 1))
    first_odd = prefix + len(even) - merged
    assert_same("slots of the prefix", slot[:, :prefix], torch.arange(prefix).expand(len(slot), -1))
    assert_same("slots of odd positions", slot[:, odd], (first_odd + torch.arange(len(odd))).expand(len(slot), -1))
    if len(even) == 0 or len(odd) == 0:
        assert_same("slots", slot, torch.arange(tokens).expand(len(slot), -1))
        return
    merges = slot[:, even] >= first_odd
    assert_same("number of merging tokens", merges.sum(1), torch.full((len(slot),), merged))
    stays = prefix - 1 + (~merges).cumsum(1)
    assert_same("slots of what stays", slot[:, even][~merges], stays[~merges])

    match = (slot[:, even] - first_odd).clamp_min(0)  # of what merges
    table = cosines(keys)[:, even][:, :, odd].nan_to_num(nan=-torch.inf)  # a NaN is similar to nothing
    best, found = table.amax(2), table.gather(2, match[..., None]).squeeze(-1)
    missed = torch.where(best.isinf() | ~merges, 0.0, best - found)
    assert_within_rounding("a destination less similar was chosen, by", missed, rounding)
    least = torch.where(merges, best, torch.inf).amin(1)
    most = torch.where(merges, -torch.inf, best).amax(1)
    assert_within_rounding("a source less similar was chosen, by", (most - least).nan_to_num(nan=0), rounding)
    nothing = best.isinf()
    assert_same("match of what is similar to nothing", match[merges & nothing], match[merges & nothing].mul(0))
    check_first_merge("of what is similar to nothing", merges, torch.where(nothing, -1, torch.arange(len(even))))
    if bits:
        first = first_of_equals(keys[:, odd]).gather(1, match)
        assert_same("match among destinations that are equal bit for bit", match[merges], first[merges])
        check_first_merge("of sources that are equal bit for bit", merges, first_of_equals(keys[:, even]))


def assert_within_rounding(what: str, excess: Tensor, rounding: float) -> None:
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= rounding, f"{what} {worst:.3e}"


def check_first_merge(what: str, merges: Tensor, group: Tensor) -> None:
    """In each group of sources (B, K) none merges after one that stays."""
    before = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool).tril(-1)
    wrong = (group[:, :, None] == group[:, None, :]) & before & merges[:, :, None] & ~merges[:, None, :]
    assert not wrong.any(), f"{what} a later one merges, at {wrong.nonzero()[0].tolist()}"
