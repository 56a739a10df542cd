"""compose_slots: two compressions in a row."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_same
from hypothesis import given
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference

SLOT = torch.zeros(2, 6, dtype=torch.int64)


@st.composite
def slot_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    images, tokens = draw(st.integers(0, 3)), draw(st.sampled_from([1, 3, 17, 65, 197]))
    between = draw(st.integers(0, tokens))
    after = draw(st.integers(0, between))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    first = torch.randint(-1, between, (images, tokens), generator=random)
    return first, torch.randint(-1, after, (images, between), generator=random)


@given(pair=slot_pairs())
def test_every_token(device: torch.device, pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    expected = [
        [-1 if slot < 0 else followed[slot] for slot in slots]
        for slots, followed in zip(first.tolist(), second.tolist(), strict=True)
    ]
    out = ops.compose_slots(first.to(device), second.to(device))
    assert_same("slot", out, torch.tensor(expected, dtype=torch.int64).view(first.shape))
    if second.shape[1] > 0:
        assert_same("reference", reference.compose_slots(first, second), out)


def test_two_compressions_are_one(device: torch.device) -> None:
    """Size-weighted means merge to the same whether in two steps or at once."""
    x = torch.randn(2, 33, 8, device=device)
    importance = torch.rand(2, 2, 33, device=device)
    options: dict[str, Any] = {"mean_rule": "weighted", "size_rule": "sum"}
    once, size, first = ops.prune_merge(x, importance[0], 30, 20, **options)
    twice, size, second = ops.prune_merge(once, importance[1, :, :20], 18, 9, size, **options)
    slot = ops.compose_slots(first, second)
    torch.testing.assert_close(ops.merge_reduce(x, slot, 9), twice)
    counts = torch.stack([(slot == position).sum(1) for position in range(9)], 1)
    assert_same("size", size, counts.float())


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        (None, SLOT, InputTypeError, "first must be a tensor (B, N), got NoneType"),
        (SLOT, [0], InputTypeError, "second must be a tensor (B, N), got list"),
        (SLOT.int(), SLOT, InputTypeError, "first must be int64, got torch.int32"),
        (SLOT, SLOT.float(), InputTypeError, "second must be int64, got torch.float32"),
        (SLOT[0], SLOT, InputValueError, "first must be (B, N), got shape (6,)"),
        (SLOT, SLOT[None], InputValueError, "second must be (B, N), got shape (1, 2, 6)"),
        (SLOT, SLOT[:1], InputValueError, "first and second must have one batch size, got 2 and 1"),
    ],
)
def test_errors(first: Any, second: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.compose_slots(first, second)


@pytest.mark.parametrize("first", [6, 2**40])
def test_slots_out_of_range_are_not_read(first: int) -> None:
    with pytest.raises(InputValueError):
        ops.compose_slots(SLOT + first, SLOT)


def test_another_device() -> None:
    with pytest.raises(InputValueError, match="second is on meta and first on cpu"):
        ops.compose_slots(SLOT, SLOT.to("meta"))


def test_positions_out_of_range() -> None:
    first, second = torch.tensor([[0, 1, 2]]), torch.tensor([[0, -1]])
    with pytest.raises(InputValueError, match=r"first must lie in -1 \.\. 1, got values from 0 to 2"):
        ops.compose_slots(first, second)
