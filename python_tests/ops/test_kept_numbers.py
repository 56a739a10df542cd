"""Which tokens masked_prune_merge keeps follows from the kept numbers by one rule, csrc/common/kept_numbers.h."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_same

TOKENS, PREFIX = 7, 0
BELOW_HALF = math.nextafter(0.5, 0)


def whole(number: float) -> int:
    """The nearest whole number in 0 .. TOKENS, halves up."""
    return min(math.floor(number) + (number - math.floor(number) >= 0.5), TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alive", [7, 5])
@pytest.mark.parametrize(
    ("kept_p", "kept_m"),
    [(6.0, 4.0), (5.5, 2.5), (4.499, 3.5), (2.25, 1.75), (0.49999997, 3.0), (BELOW_HALF, 3.0), (0.5, 1.0), (99.0, 6.5)],
)
def test_the_rule(device: torch.device, dtype: torch.dtype, alive: int, kept_p: float, kept_m: float) -> None:
    kept_p, kept_m = (torch.tensor(number, dtype=dtype) for number in (kept_p, kept_m))
    last = alive
    middle = max(min(whole(kept_p.item()), last), PREFIX)
    kept = max(min(whole(kept_m.item()), middle), min(PREFIX + 1, middle))

    x = torch.randn(2, TOKENS, 8, dtype=dtype, device=device)
    mask = (torch.arange(TOKENS) < alive).to(dtype).expand(2, -1).to(device)
    importance = torch.arange(TOKENS, 0, -1).to(dtype).expand(2, -1).to(device)  # in sorted order
    probability = torch.ones(TOKENS, dtype=dtype, device=device)
    _, out_mask, _, order, dst = torch.ops.diffrate.masked_prune_merge(
        x, mask, importance, None, probability, probability, kept_p.to(device), kept_m.to(device), PREFIX, "cosine"
    )
    position = torch.arange(TOKENS)
    assert_same("order", order.cpu(), position.expand(2, -1))
    assert_same("mask", out_mask.cpu(), ((position < kept) & (position < last)).to(dtype).expand(2, -1))
    is_source = ((position >= kept) & (position < middle)).expand(2, -1)
    assert_same("what merges", dst.cpu() != position, is_source)
    assert bool((dst.cpu()[is_source] < kept).all())
