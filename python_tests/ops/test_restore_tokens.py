"""restore_tokens: tokens back in their places."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_same
from hypothesis import given
from strategies import TokenCase, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops


@st.composite
def restorations(draw: st.DrawFn) -> tuple[TokenCase, Tensor, Tensor | None]:
    case = draw(token_cases(features=["normal", "NaN"]))
    places = draw(st.sampled_from([1, 3, 17, 65]))
    random = torch.Generator().manual_seed(case.seed)
    slot = torch.randint(-1, case.tokens, (case.images, places), generator=random)
    fill = torch.randn(case.channels, generator=random).to(case.dtype)
    by_place = torch.randn(case.images, places, case.channels, generator=random).to(case.dtype)
    return case, slot, draw(st.sampled_from([fill, by_place, None]))


@given(restoration=restorations())
def test_every_place(device: torch.device, restoration: tuple[TokenCase, Tensor, Tensor | None]) -> None:
    case, slot, fill = restoration
    x = case.x()
    pruned = torch.zeros(case.channels, dtype=case.dtype) if fill is None else fill
    expected = torch.zeros(*slot.shape, case.channels, dtype=case.dtype)
    for image, slots in enumerate(slot.tolist()):
        for place, position in enumerate(slots):
            filled = pruned if pruned.dim() == 1 else pruned[image, place]
            expected[image, place] = filled if position < 0 else x[image, position]
    out = ops.restore_tokens(case.x(device), slot.to(device), None if fill is None else fill.to(device))
    assert_same("x", out, expected)


@given(restoration=restorations())
def test_gradients(device: torch.device, restoration: tuple[TokenCase, Tensor, Tensor | None]) -> None:
    """Of small integers, whose sums are exact in any order and dtype."""
    case, slot, fill = restoration
    x = replace(case, features="normal").x(device).requires_grad_()
    fill = torch.zeros(case.channels, dtype=case.dtype) if fill is None else fill
    fill_leaf = fill.to(device).requires_grad_()
    gradient = torch.randint(-1, 2, (*slot.shape, case.channels)).to(case.dtype)
    ops.restore_tokens(x, slot.to(device), fill_leaf).backward(gradient.to(device))
    pruned = (slot < 0)[..., None]
    expected = torch.zeros(x.shape, dtype=torch.float64)
    kept = gradient.double().masked_fill(pruned, 0)
    expected.scatter_add_(1, slot.clamp_min(0)[..., None].expand_as(kept), kept)
    assert x.grad is not None
    assert fill_leaf.grad is not None
    assert_same("gradient of x", x.grad.double(), expected)
    of_pruned = gradient.double().masked_fill(~pruned, 0)
    assert_same("gradient of fill", fill_leaf.grad.double(), of_pruned.sum((0, 1)) if fill.dim() == 1 else of_pruned)


def test_gradcheck(device: torch.device) -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    fill = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    slot = torch.randint(-1, 4, (2, 6), device=device)
    assert torch.autograd.gradcheck(lambda x, fill: ops.restore_tokens(x, slot, fill), [x, fill])
    assert torch.autograd.gradgradcheck(lambda x, fill: ops.restore_tokens(x, slot, fill), [x, fill])


def test_after_prune_merge(device: torch.device) -> None:
    """Tokens that were equal, and so merged into each other, come back as they were."""
    x = torch.eye(4, device=device).repeat_interleave(3, 0)[None]
    out, _, slot = ops.prune_merge(x, torch.zeros(1, 11, device=device), 12, 10)
    assert_same("x", ops.restore_tokens(out, slot), x)


@pytest.mark.parametrize("fill", [None, torch.tensor([1.0, 2.0])])
def test_nothing_was_kept(device: torch.device, fill: Tensor | None) -> None:
    slot = torch.full((2, 5), -1, device=device)
    out = ops.restore_tokens(torch.zeros(2, 0, 2, device=device), slot, None if fill is None else fill.to(device))
    assert_same("x", out, (torch.zeros(2) if fill is None else fill).expand(2, 5, 2))


X, SLOT = torch.zeros(2, 4, 3), torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, InputTypeError, "x must be a tensor (B, K, C), got NoneType"),
        ({"x": X[0]}, InputValueError, "x must be (B, K, C), got shape (4, 3)"),
        ({"x": X.long()}, InputTypeError, "x must be float32"),
        ({"slot": 0}, InputTypeError, "slot must be a tensor (B, N), got int"),
        ({"slot": SLOT.int()}, InputTypeError, "slot must be int64, got torch.int32"),
        ({"slot": SLOT[0]}, InputValueError, "slot must be (B, N), got shape (6,)"),
        ({"slot": SLOT[:1]}, InputValueError, "slot must have the batch size of x, 2, got 1"),
        ({"slot": SLOT.to("meta")}, InputValueError, "slot is on meta and x on cpu"),
        ({"fill": 0.0}, InputTypeError, "fill must be a tensor (C,), got float"),
        ({"fill": torch.zeros(2)}, InputValueError, "fill must be (C,) = (3,), got shape (2,)"),
        ({"fill": torch.zeros(1, 3)}, InputValueError, "fill must be (C,), got shape (1, 3)"),
        ({"fill": torch.zeros(2, 5, 3)}, InputValueError, "fill must be (B, N, C) = (2, 6, 3), got shape (2, 5, 3)"),
        ({"fill": torch.zeros(3).half()}, InputTypeError, "fill is torch.float16 and x torch.float32"),
        ({"fill": torch.zeros(3, device="meta")}, InputValueError, "fill is on meta and x on cpu"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.restore_tokens(**{"x": X, "slot": SLOT, **changes})


@pytest.mark.parametrize("position", [4, 2**40])
def test_slots_out_of_range_are_not_read(position: int) -> None:
    with pytest.raises(InputValueError):
        ops.restore_tokens(X, SLOT + position)


def test_positions_out_of_range() -> None:
    with pytest.raises(InputValueError, match=r"slot must lie in -1 \.\. 1, got values from -2 to 0"):
        ops.restore_tokens(torch.zeros(1, 2, 3), torch.tensor([[0, -2, -1]]))
