"""merge_reduce and its gradient."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given
from strategies import CPU, TokenCase, make_size, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference


@dataclass(frozen=True)
class Reduction:
    """Tokens, their number of destinations, and how these lie in memory."""

    case: TokenCase
    kept: int
    layout: str
    has_residual: bool

    def residual(self, device: torch.device = CPU) -> Tensor | None:
        return self.case.x(device, salt=4) if self.has_residual else None

    def dst(self, device: torch.device = CPU) -> Tensor:
        random = torch.Generator().manual_seed(self.case.seed)
        dst = torch.randint(-1, self.kept, (self.case.images, self.case.tokens), generator=random).to(device)
        if self.layout == "transposed":
            return dst.t().contiguous().t()
        return dst[:1].expand_as(dst) if self.layout == "expanded" else dst

    def weights(self, device: torch.device = CPU) -> Tensor | None:
        """Weights without cancelling; what cancels has a test of its own."""
        random = torch.Generator().manual_seed(self.case.seed + 1)
        weights = make_size(self.case.sizes, (self.case.images, self.case.tokens), self.case.wide, random)
        return None if weights is None else weights.abs().to(device)


@st.composite
def reductions(draw: st.DrawFn) -> Reduction:
    case = draw(token_cases(features=["normal", "clustered", "zero rows", "large", "NaN"]))
    kept = draw(st.one_of(st.sampled_from([0, 1, case.tokens]), st.integers(0, 2 * case.tokens)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "expanded"]))
    return Reduction(case, kept, layout, draw(st.booleans()))


@given(reduction=reductions())
def test_results(device: torch.device, reduction: Reduction) -> None:
    case, kept = reduction.case, reduction.kept
    x, dst, weights, residual = case.x(), reduction.dst(), reduction.weights(), reduction.residual()
    options = {"weights": reduction.weights(device), "residual": reduction.residual(device)}
    out = ops.merge_reduce(case.x(device), reduction.dst(device), kept, **options)
    assert out.is_contiguous()
    if residual is not None:
        x = x + residual  # rounded to its dtype, as by itself

    def compute(x: Tensor, weights: Tensor | None) -> Tensor:
        return reference.merge_reduce(x, dst, kept, weights=weights)

    assert_as_accurate_as_eager("x", out, compute, [x, weights], dtype=case.dtype)
    alone = torch.zeros(case.images, kept + 1, dtype=torch.int64).scatter_add(1, dst % (kept + 1), torch.ones_like(dst))
    is_alone = (alone.gather(1, dst % (kept + 1)) == 1) & (dst >= 0)
    if weights is not None:
        is_alone &= weights != 0
    if kept > 0:  # the mean of one token is that token, to the bit
        assert_same("tokens alone", reference.gather_tokens(out.cpu(), dst.clamp_min(0))[is_alone], x[is_alone])


@given(reduction=reductions())
def test_gradient(device: torch.device, reduction: Reduction) -> None:
    case, kept = reduction.case, reduction.kept
    dst, weights, gradient = reduction.dst(), reduction.weights(), case.gradient(kept)
    x, residual = case.x(device).requires_grad_(), reduction.residual(device)
    if residual is not None:
        residual.requires_grad_()
    options = {"weights": reduction.weights(device), "residual": residual}
    out = ops.merge_reduce(x, reduction.dst(device), kept, **options)
    out.backward(gradient.to(device))

    def compute(gradient: Tensor, weights: Tensor | None) -> Tensor:
        start = torch.zeros(case.images, case.tokens, case.channels, dtype=gradient.dtype, requires_grad=True)
        reference.merge_reduce(start, dst, kept, weights=weights).backward(gradient)
        assert start.grad is not None
        return start.grad

    assert x.grad is not None
    assert_as_accurate_as_eager("gradient", x.grad, compute, [gradient, weights], dtype=case.dtype)
    if residual is not None:
        assert residual.grad is not None
        assert_same("gradient of the residual", residual.grad, x.grad)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(device: torch.device, weighted: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=random).to(device).requires_grad_()
    dst = torch.randint(-1, 4, (2, 6), generator=random).to(device)
    weights = torch.rand(2, 6, dtype=torch.float64, generator=random).to(device) if weighted else None

    residual = torch.randn(2, 6, 3, dtype=torch.float64, generator=random).to(device).requires_grad_()

    def function(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.merge_reduce(x, dst, 4, weights=weights, residual=residual)

    for inputs in ([x], [x, residual]):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    gradient = torch.randn(2, 4, 3, dtype=torch.float64, generator=random).to(device).requires_grad_()
    backward = torch.ops.diffrate.merge_reduce_backward
    assert torch.autograd.gradcheck(lambda grad: backward(grad, dst, weights), [gradient])
    assert torch.autograd.gradgradcheck(lambda grad: backward(grad, dst, weights), [gradient])


def test_weights_that_cancel_give_zero(device: torch.device) -> None:
    x = torch.randn(1, 5, 3, device=device, requires_grad=True)
    dst = torch.tensor([[0, 0, 1, 2, 2]], device=device)
    weights = torch.tensor([[1.0, -1.0, 0.0, 2.0, -1.0]], device=device)
    out = ops.merge_reduce(x, dst, 4, weights=weights)
    assert_same("cancelled, weightless and empty", out[:, [0, 1, 3]], torch.zeros(1, 3, 3))
    torch.testing.assert_close(out[:, 2], 2 * x[:, 3] - x[:, 4])
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[0.0] * 3, [0.0] * 3, [0.0] * 3, [2.0] * 3, [-1.0] * 3]]


def test_residual_of_another_dtype(device: torch.device) -> None:
    """As under autocast: the result has the dtype of the sum."""
    x, dst = torch.randn(1, 4, 3, device=device), torch.tensor([[0, 0, 1, 1]], device=device)
    residual = torch.randn(1, 4, 3, device=device, dtype=torch.bfloat16)
    expected = ops.merge_reduce(x + residual, dst, 2)
    assert_same("residual in bfloat16", ops.merge_reduce(x, dst, 2, residual=residual), expected)
    assert_same("x in bfloat16", ops.merge_reduce(residual, dst, 2, residual=x), expected)


def test_weights_of_another_dtype(device: torch.device) -> None:
    x, dst = torch.randn(1, 4, 3, device=device), torch.tensor([[0, 0, 1, 1]], device=device)
    weights = torch.tensor([[1, 2, 3, 4]], dtype=torch.float16, device=device)
    expected = ops.merge_reduce(x, dst, 2, weights=weights.float())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_same("x", ops.merge_reduce(x, dst, 2, weights=weights.to(dtype)), expected)


WILD = torch.tensor([[0, 5, -2, 3, 2**40, -(2**63), 2**63 - 1, 2]])


def test_destinations_out_of_range_are_refused() -> None:
    x = torch.randn(1, 8, 3)
    with pytest.raises(
        InputValueError,
        match=r"dst must lie in -1 \.\. 3, got values from -9223372036854775808 to 9223372036854775807",
    ):
        ops.merge_reduce(x, WILD, 4)
    with pytest.raises(InputValueError, match=r"dst must lie in -1 \.\. 3, got values from 0 to 4"):
        ops.merge_reduce(x, torch.arange(8)[None] // 2 + (torch.arange(8)[None] == 7), 4)
    with pytest.raises(InputValueError, match="got values from -2 to 0"):
        ops.merge_reduce(x, torch.zeros(1, 8, dtype=torch.int64) - 2 * (torch.arange(8) == 3), 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_leaves_out_what_is_out_of_range(device: torch.device, weighted: bool) -> None:
    x = torch.randn(1, 8, 3, device=device)
    weights = torch.rand(1, 8, device=device) if weighted else None
    valid = torch.where((WILD < 0) | (WILD >= 4), -1, WILD).to(device)
    wild = WILD.to(device)
    operator = torch.ops.diffrate
    assert_same("x", operator.merge_reduce(x, wild, 4, weights), operator.merge_reduce(x, valid, 4, weights))
    gradient = torch.randn(1, 4, 3, device=device)
    backward = operator.merge_reduce_backward(gradient, wild, weights)
    assert_same("gradient", backward, operator.merge_reduce_backward(gradient, valid, weights))
    assert_same("gradient of what was left out", backward[:, [1, 2, 4, 5, 6]], torch.zeros(1, 5, 3))


X, DST = torch.zeros(2, 6, 3), torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, InputTypeError, "x must be a tensor (B, N, C), got NoneType"),
        ({"x": X[0]}, InputValueError, "x must be (B, N, C), got shape (6, 3)"),
        ({"x": X.long()}, InputTypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({"dst": [0]}, InputTypeError, "dst must be a tensor (B, N), got list"),
        ({"dst": DST.int()}, InputTypeError, "dst must be int64, got torch.int32"),
        ({"dst": DST.float()}, InputTypeError, "dst must be int64, got torch.float32"),
        ({"dst": DST[:, :5]}, InputValueError, "dst must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"dst": DST[:1]}, InputValueError, "dst must be (B, N) = (2, 6), got shape (1, 6)"),
        ({"dst": DST.to("meta")}, InputValueError, "dst is on meta and x on cpu"),
        ({"kept": -1}, InputValueError, "kept must be at least 0, got -1"),
        ({"kept": 2.0}, InputTypeError, "kept must be an int, got float"),
        ({"weights": 1.0}, InputTypeError, "weights must be a tensor (B, N), got float"),
        ({"weights": torch.ones(2, 5)}, InputValueError, "weights must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"weights": torch.ones(2, 6).int()}, InputTypeError, "weights must be float32"),
        ({"weights": torch.ones(2, 6, device="meta")}, InputValueError, "weights is on meta and x on cpu"),
        ({"residual": X[:, :5]}, InputValueError, "residual must be the shape of x = (2, 6, 3), got shape (2, 5, 3)"),
        ({"residual": X.int()}, InputTypeError, "residual must be float32"),
        ({"residual": X.to("meta")}, InputValueError, "residual is on meta and x on cpu"),
        ({"weights": torch.ones(2, 6, requires_grad=True)}, InputValueError, "weights must not require a gradient"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "dst": DST, "kept": 4, **changes}
    with pytest.raises(error, match=re.escape(message)):
        ops.merge_reduce(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (X[0], DST, 4),
        (X.long(), DST, 4),
        (X, DST[:, :5], 4),
        (X, DST[:1], 4),
        (X, DST[0], 4),
        (X, DST.int(), 4),
        (X, DST.double(), 4),
        (X, DST, -1),
        (X, DST, 2**31),
        (X, DST, 4, torch.ones(2, 5)),
        (X, DST, 4, torch.ones(1, 6)),
        (X, DST, 4, torch.ones(2, 6).half()),
        (X, DST, 4, None, X[:, :5]),
        (X, DST, 4, None, X.half()),
    ],
)
def test_the_operator_checks_for_itself(arguments: tuple) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.merge_reduce(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (X[0], DST),
        (X.long(), DST),
        (X, DST[0]),
        (X, DST[:1]),
        (X, DST.int()),
        (X, DST, torch.ones(2, 3)),
        (X, DST, torch.ones(2, 6).double()),
    ],
)
def test_the_backward_operator_checks_for_itself(arguments: tuple) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.merge_reduce_backward(*arguments)
