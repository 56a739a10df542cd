"""add_norm: the sum, bit by bit, and its layer normalization."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from called_operators import CalledOperators
from compare import assert_same
from hypothesis import given
from norm_checks import check_normalized, norm_of
from strategies import DTYPES, TokenCase, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference


@given(
    case=token_cases(),
    constant=st.sampled_from([0.0, 0.5]),
    offset=st.sampled_from([0.0, 1.0, -300.0, 1e3]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    bias=st.booleans(),
)
def test_results(device: torch.device, case: TokenCase, constant: float, offset: float, eps: float, bias: bool) -> None:
    x, residual = case.x(device) + offset, case.x(device, salt=4)
    some = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(case.seed)) < constant
    x, residual = (torch.where(some[..., None].to(device), each[..., :1], each) for each in (x, residual))
    norm = norm_of(case.channels, case.dtype, device, bias=bias, eps=eps)
    before = x.clone(), residual.clone()
    found = ops.add_norm(x, residual, norm)
    assert_same("x", found.x, x + residual)
    assert found.x.is_contiguous()
    check_normalized(found.normalized, found.x, norm)
    for now, then in zip((x, residual), before, strict=True):
        assert_same("an argument", now, then)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 768, 1280, 1288, 1291, 2048])
def test_few_and_many_channels(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Rows that fit into registers and rows that do not."""
    case = TokenCase(3, 33, channels, 1, dtype)
    x, residual, norm = case.x(device) + 3, case.x(device, salt=1), norm_of(channels, dtype, device)
    found = ops.add_norm(x, residual, norm)
    assert_same("x", found.x, x + residual)
    check_normalized(found.normalized, found.x, norm)


def test_views_of_any_layout(device: torch.device) -> None:
    """Strided rows, and rows that are not aligned as whole tensors are."""
    values = torch.randn(2, 4, 33, 65, generator=torch.Generator().manual_seed(1)).half().to(device)
    norm = norm_of(64, torch.float16, device)
    for cut in (lambda x: x[::2, 1:, 1:], lambda x: x[..., 1:], lambda x: x[:, :, ::1].mT[:, :64].mT):
        x, residual = cut(values[0]), cut(values[1])
        for arguments in ((x, residual), (x.contiguous(), residual), (x, residual.contiguous())):
            found = ops.add_norm(*arguments, norm)
            assert_same("x", found.x, x + residual)
            check_normalized(found.normalized, found.x, norm)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_nothing_to_do(device: torch.device, shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, device=device)
    found = ops.add_norm(x, x, norm_of(shape[2], torch.float32, device))
    assert found.x.shape == found.normalized.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 2, 17, 24).to(dtype)
    norm = norm_of(24, dtype, torch.device("cpu"))
    added, normalized = reference.add_norm(x, residual, norm)
    assert_same("x", added, x + residual)
    check_normalized(normalized, added, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_two_dtypes(device: torch.device, dtype: torch.dtype, other: torch.dtype) -> None:
    """As in PyTorch the sum has the wider one."""
    x, residual = torch.randn(2, 2, 17, 8, device=device)
    x, residual = x.to(dtype), residual.to(other)
    norm = norm_of(8, torch.promote_types(dtype, other), device)
    found = ops.add_norm(x, residual, norm)
    assert_same("x", found.x, x + residual)
    check_normalized(found.normalized, found.x, norm)


def test_not_a_number_stays_in_its_row(device: torch.device) -> None:
    x = torch.randn(1, 4, 24, device=device)
    x[0, 1, 3], x[0, 2, 5] = torch.nan, torch.inf
    found = ops.add_norm(x, torch.ones_like(x), norm_of(24, torch.float32, device))
    assert found.normalized.isnan().all(2).tolist() == [[False, True, True, False]]
    assert not found.normalized[0, 0].isnan().any()


# --- gradients


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(device: torch.device, bias: bool) -> None:
    random = torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, 2, 5, 3, dtype=torch.float64, generator=random).to(device)
    norm = norm_of(3, torch.float64, device, bias=bias, eps=0.1)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, *norm[:2]) if tensor is not None]

    def function(x: Tensor, residual: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(ops.add_norm(x, residual, ops.Norm(norm[0], *norm[1:], eps=0.1)))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("leaf", ["x", "residual", "weight", "bias"])
def test_in_one_pass_where_no_gradient_is_needed(device: torch.device, leaf: str) -> None:
    x, residual = torch.randn(2, 2, 17, 8, device=device)
    norm = norm_of(8, torch.float32, device)
    tensors = {"x": x, "residual": residual, "weight": norm.weight, "bias": norm.bias}
    tensors[leaf].requires_grad_()  # type: ignore[union-attr]
    with CalledOperators() as called:
        smooth = ops.add_norm(x, residual, norm)
        assert called.names == []
        with torch.no_grad():
            fused = ops.add_norm(x, residual, norm)
    assert called.names == ["add_norm"]
    assert smooth.normalized.requires_grad
    assert not fused.normalized.requires_grad
    torch.testing.assert_close(fused.normalized, smooth.normalized)


def test_the_operator_itself_has_no_gradient(device: torch.device) -> None:
    x, norm = torch.randn(1, 6, 3, device=device, requires_grad=True), norm_of(3, torch.float32, device)
    found = torch.ops.diffrate.add_norm(x, x, *norm)
    with pytest.raises(RuntimeError, match=r"diffrate_ext\.ops\.add_norm has one"):
        found[1].sum().backward()


@pytest.mark.parametrize("gradient", [False, True])
def test_autocast(device: torch.device, gradient: bool) -> None:
    """What is normalised has the dtype of the sum."""
    x = torch.randn(1, 17, 8, device=device).bfloat16().requires_grad_(gradient)
    norm = norm_of(8, torch.bfloat16, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = ops.add_norm(x, x.detach(), norm)
    assert (found.x.dtype, found.normalized.dtype) == (torch.bfloat16, torch.bfloat16)
    check_normalized(found.normalized.detach(), found.x.detach(), norm)


# --- errors

X = torch.zeros(2, 6, 3)
ONES = torch.ones(3)
GOOD: dict[str, Any] = {"x": X, "residual": X, "norm": ops.Norm(ONES, ONES)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 1}, InputTypeError, "x must be a tensor (B, N, C), got int"),
        ({"x": X[0]}, InputValueError, "x must be (B, N, C), got shape (6, 3)"),
        ({"x": X.long()}, InputTypeError, "x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({"residual": None}, InputTypeError, "residual must be a tensor (B, N, C), got NoneType"),
        ({"residual": X[:1]}, InputValueError, "residual must be the shape of x = (2, 6, 3), got shape (1, 6, 3)"),
        ({"residual": X.to("meta")}, InputValueError, "residual is on meta and x on cpu"),
        ({"norm": None}, InputTypeError, "norm must be a Norm(weight, bias, eps), got NoneType"),
        ({"norm": (ONES, ONES, 1e-5)}, InputTypeError, "norm must be a Norm(weight, bias, eps), got tuple"),
        ({"norm": ops.Norm(ONES.half())}, InputTypeError, "norm.weight is torch.float16 and x torch.float32"),
        ({"norm": ops.Norm(torch.ones(4))}, InputValueError, "norm.weight must be (C,) = (3,), got shape (4,)"),
        ({"norm": ops.Norm(ONES, torch.ones(1))}, InputValueError, "norm.bias must be (C,) = (3,), got shape (1,)"),
        ({"norm": ops.Norm(ONES, eps=-1.0)}, InputValueError, "norm.eps must be finite and at least 0, got -1.0"),
    ],
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_errors(changes: dict[str, Any], error: type[Exception], message: str, with_gradient: bool) -> None:
    arguments = {**GOOD, **changes}
    if with_gradient and "residual" not in changes:
        arguments["residual"] = X.clone().requires_grad_()
    with pytest.raises(error, match=re.escape(message)) as caught:
        ops.add_norm(**arguments)
    assert caught.value.__context__ is None  # no terse error of the operator before it


@pytest.mark.parametrize(
    "changes",
    [
        {"x": X[0]},
        {"residual": X[:1]},
        {"residual": X.half()},
        {"norm_weight": torch.ones(4)},
        {"norm_weight": ONES.half()},
        {"norm_bias": torch.ones(2)},
        {"norm_bias": ONES.double()},
        {"norm_eps": -1.0},
        {"norm_eps": float("nan")},
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any]) -> None:
    good = {"x": X, "residual": X, "norm_weight": ONES, "norm_bias": ONES, "norm_eps": 1e-5}
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.add_norm(**{**good, **changes})
