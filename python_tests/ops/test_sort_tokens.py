"""sort_tokens: order exactly, features and sizes to the bit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compare import assert_same
from hypothesis import given
from oracles import sorted_positions
from strategies import TokenCase, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference


def gathered(x: Tensor, order: Tensor) -> Tensor:
    return torch.stack([rows[index] for rows, index in zip(x, order, strict=True)]) if len(x) else x


@given(case=token_cases())
def test_order_and_values(device: torch.device, case: TokenCase) -> None:
    x, importance = case.x(), case.importance()
    order = sorted_positions(case.patch_importance(importance), case.prefix)
    found = ops.sort_tokens(case.x(device), case.importance(device), case.size(device), prefix=case.prefix)
    assert_same("order", found.order, order)
    assert_same("x", found.x, gathered(x, order))
    assert_same("size", found.size, gathered(case.plain_size(), order))
    assert found.x.is_contiguous()
    assert found.size.is_contiguous()


@given(case=token_cases())
def test_the_reference_agrees(case: TokenCase) -> None:
    x, importance, size = case.x(), case.importance(), case.size()
    expected = reference.sort_tokens(x, case.patch_importance(importance), size, prefix=case.prefix)
    actual = ops.sort_tokens(x, importance, size, prefix=case.prefix)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert_same(name, a, b)


def test_the_prefix_of_full_importance_is_ignored(device: torch.device) -> None:
    x, patch_importance = torch.randn(2, 9, 4, device=device), torch.rand(2, 7, device=device)
    _, _, order = ops.sort_tokens(x, patch_importance, prefix=2)
    for prefix_importance in (-1.0, 7.0, torch.nan):
        full = torch.cat([torch.full((2, 2), prefix_importance, device=device), patch_importance], 1)
        assert_same("order", ops.sort_tokens(x, full, prefix=2)[2], order)


def test_neighbouring_floats_are_told_apart(device: torch.device) -> None:
    one = torch.ones(())
    values = torch.stack([one, one.nextafter(2 * one), one, one.nextafter(0 * one)])[None].to(device)
    order = ops.sort_tokens(torch.zeros(1, 4, 1, device=device), values, prefix=0)[2]
    assert order.tolist() == [[1, 0, 2, 3]]
    double = torch.ones((), dtype=torch.float64)
    values = torch.stack([double, double.nextafter(2 * double)])[None].to(device)
    order = ops.sort_tokens(torch.zeros(1, 2, 1, dtype=torch.float64, device=device), values, prefix=0)[2]
    assert order.tolist() == [[1, 0]]


@given(case=token_cases(features=["normal", "NaN"]))
def test_gradient(device: torch.device, case: TokenCase) -> None:
    x = case.x(device).requires_grad_()
    out, size, order = ops.sort_tokens(x, case.importance(device), prefix=case.prefix)
    assert not size.requires_grad
    gradient = case.gradient(case.tokens, device)
    out.backward(gradient)
    assert x.grad is not None
    assert_same("gradient", gathered(x.grad.cpu(), order.cpu()), gradient)


def test_gradcheck(device: torch.device) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    importance = torch.rand(2, 6, device=device)
    assert torch.autograd.gradcheck(lambda x: ops.sort_tokens(x, importance)[0], [x])
    assert torch.autograd.gradgradcheck(lambda x: ops.sort_tokens(x, importance)[0], [x])


def test_importance_and_size_are_constants(device: torch.device) -> None:
    x = torch.randn(1, 4, 2, device=device, requires_grad=True)
    importance = torch.rand(1, 4, device=device, requires_grad=True)
    size = torch.ones(1, 4, device=device, requires_grad=True)
    out, out_size, _ = ops.sort_tokens(x, importance, size)
    assert not out_size.requires_grad
    out.sum().backward()
    assert importance.grad is None
    assert size.grad is None


X = torch.zeros(2, 5, 3)
GOOD: dict[str, Any] = {"x": X, "importance": torch.zeros(2, 4), "size": None, "prefix": 1}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, InputTypeError, "x must be a tensor (B, N, C), got list"),
        ({"x": X[0]}, InputValueError, "x must be (B, N, C), got shape (5, 3)"),
        ({"x": X.int()}, InputTypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        (
            {"x": X.to(torch.complex64)},
            InputTypeError,
            "x must be float32, float16, bfloat16 or float64, got torch.complex64",
        ),
        ({"importance": None}, InputTypeError, "importance must be a tensor (B, N-P) or (B, N), got NoneType"),
        (
            {"importance": torch.zeros(2, 1, 5)},
            InputValueError,
            "importance must be (B, N-P) or (B, N), got shape (2, 1, 5)",
        ),
        (
            {"importance": torch.zeros(2, 3)},
            InputValueError,
            "importance must be (B, N-P) = (2, 4) or (B, N) = (2, 5), got shape (2, 3)",
        ),
        ({"importance": torch.zeros(1, 4)}, InputValueError, "got shape (1, 4)"),
        ({"importance": torch.zeros(2, 4).long()}, InputTypeError, "importance must be float32"),
        ({"importance": torch.zeros(2, 4, device="meta")}, InputValueError, "importance is on meta and x on cpu"),
        ({"size": 3}, InputTypeError, "size must be a tensor (B, N), got int"),
        ({"size": torch.ones(2, 4)}, InputValueError, "size must be (B, N) = (2, 5), got shape (2, 4)"),
        ({"size": torch.ones(2, 5, 1)}, InputValueError, "size must be (B, N), got shape (2, 5, 1)"),
        ({"size": torch.ones(2, 5).bool()}, InputTypeError, "size must be float32"),
        ({"size": torch.ones(2, 5, device="meta")}, InputValueError, "size is on meta and x on cpu"),
        ({"prefix": -1}, InputValueError, "prefix must be at least 0, got -1"),
        ({"prefix": 6}, InputValueError, "prefix must be at most the number of tokens, 5, got 6"),
        ({"prefix": 1.0}, InputTypeError, "prefix must be an int, got float"),
        ({"prefix": True}, InputTypeError, "prefix must be an int, got bool"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**GOOD, **changes}
    with pytest.raises(error, match=re.escape(message)):
        ops.sort_tokens(arguments["x"], arguments["importance"], arguments["size"], prefix=arguments["prefix"])


@pytest.mark.parametrize(
    "arguments",
    [
        (X[0], torch.zeros(2, 4)),
        (X, torch.zeros(2, 3)),
        (X, torch.zeros(1, 4)),
        (X, torch.zeros(8)),
        (X, torch.zeros(2, 1, 5)),
        (X, torch.zeros(2, 4).long()),
        (X.long(), torch.zeros(2, 4)),
        (X, torch.zeros(2, 4), torch.ones(2, 4)),
        (X, torch.zeros(2, 4), torch.ones(1, 5)),
        (X, torch.zeros(2, 4), torch.ones(2, 5).double()),
        (X, torch.zeros(2, 4), torch.ones(2, 5).half()),
        (X, torch.zeros(2, 4), None, -1),
        (X, torch.zeros(2, 4), None, 6),
    ],
)
def test_the_operator_checks_for_itself(arguments: tuple) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.sort_tokens(*arguments)
