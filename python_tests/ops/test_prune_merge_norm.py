"""prune_merge with a norm: the rest as without, and the tokens that it returns layer-normalised."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from called_operators import CalledOperators
from compare import assert_same
from hypothesis import given
from norm_checks import check_normalized, norm_of
from strategies import DTYPES, TokenCase, kept_numbers, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference


@given(
    case=token_cases(),
    constant=st.sampled_from([0.0, 0.5]),
    offset=st.sampled_from([0.0, 1.0, -300.0, 1e3]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    bias=st.booleans(),
    with_residual=st.booleans(),
    data=st.data(),
)
def test_results(
    device: torch.device,
    case: TokenCase,
    constant: float,
    offset: float,
    eps: float,
    bias: bool,
    with_residual: bool,
    data: st.DataObject,
) -> None:
    """Rows far from zero, whose squares alone would lose the variance, and rows without variance among them."""
    k_p, k_m = data.draw(kept_numbers(case.tokens, case.prefix))
    x = case.x(device)
    some = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(case.seed)) < constant
    x = torch.where(some[..., None].to(device), x[..., :1], x) + offset
    residual = case.x(device, salt=4) if with_residual else None
    norm = norm_of(case.channels, case.dtype, device, bias=bias, eps=eps)
    options: dict[str, Any] = {"prefix": case.prefix, "residual": residual}
    arguments = (x, case.importance(device), k_p, k_m, case.size(device))
    found = ops.prune_merge(*arguments, norm=norm, **options)
    for index, expected in enumerate(ops.prune_merge(*arguments, **options)):
        assert_same(f"result {index}", found[index], expected)
    check_normalized(found.normalized, found.x, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 768, 1280, 1288, 1291, 2048])
@pytest.mark.parametrize("k_m", [20, 30])
def test_few_and_many_channels(device: torch.device, dtype: torch.dtype, channels: int, k_m: int) -> None:
    """Rows that fit into registers and rows that do not."""
    case = TokenCase(2, 33, channels, 1, dtype)
    norm = norm_of(channels, dtype, device)
    found = ops.prune_merge(case.x(device) + 3, case.importance(device), 30, k_m, norm=norm)
    check_normalized(found.normalized, found.x, norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows_become_the_bias(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, 1e3, -700.3, 0.0, 3e-5]).to(dtype)[None, :, None].expand(2, -1, 384).to(device)
    norm = norm_of(384, dtype, device)
    found = ops.prune_merge(x, torch.ones(2, 4, device=device), 5, 5, norm=norm)
    assert norm.bias is not None
    torch.testing.assert_close(found.normalized, norm.bias.expand(2, 5, -1))


@pytest.mark.parametrize("channels", [384, 768, 1288, 37])
def test_rows_a_rounding_step_from_constant(device: torch.device, channels: int) -> None:
    """Their variance is less than what rounding does to the mean, squared."""
    x = torch.linspace(9e4, 1.1e5, 64)[None, :, None].repeat(1, 1, channels)
    x[..., channels // 2] = x[..., 0].nextafter(torch.tensor(torch.inf))
    norm = norm_of(channels, torch.float32, device, bias=False)
    found = ops.prune_merge(x.to(device), torch.ones(1, 63, device=device), 64, 64, norm=norm)
    exact = F.layer_norm(x.double(), (channels,), norm.weight.double().cpu(), eps=norm.eps)
    torch.testing.assert_close(found.normalized.cpu().double(), exact, rtol=1e-3, atol=1e-4)


def test_parameters_of_any_layout(device: torch.device) -> None:
    """Views of flat parameters, which are not aligned as whole tensors are, and strided ones."""
    case = TokenCase(2, 33, 64, 1, torch.float16)
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    around = torch.full((3, 129), torch.nan, dtype=torch.float16, device=device)
    strided, shifted = around[0, ::2][1:], around[1, 1:65]
    strided.copy_(values[0])
    shifted.copy_(values[1])
    assert shifted.data_ptr() % 16 != 0
    for norm in (ops.Norm(strided, shifted), ops.Norm(shifted, strided), ops.Norm(shifted)):
        found = ops.prune_merge(case.x(device), case.importance(device), 30, 20, norm=norm)
        check_normalized(found.normalized, found.x, norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(dtype: torch.dtype) -> None:
    x, norm = torch.randn(2, 17, 24).to(dtype) + 2, norm_of(24, dtype, torch.device("cpu"))
    *merged, normalized = reference.prune_merge(x, torch.rand(2, 16), 14, 9, norm=norm)
    assert len(merged) == 3
    check_normalized(normalized, merged[0], norm)
    plain = F.layer_norm(x, (24,), norm.weight, eps=0.1)
    torch.testing.assert_close(reference.layer_norm(x, norm.weight, None, 0.1), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_of_another_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """The norm has the dtype of the sum."""
    x, residual = torch.randn(2, 1, 17, 8, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    arguments = (x.to(dtype), torch.rand(1, 16, device=device), 12, 9)
    residual, norm = residual.to(wide), norm_of(8, wide, device)
    found = ops.prune_merge(*arguments, residual=residual, norm=norm)
    assert found.x.dtype == wide
    check_normalized(found.normalized, found.x, norm)
    if dtype != wide:
        with pytest.raises(InputTypeError, match=re.escape(f"norm.weight is {dtype} and x {wide}")):
            ops.prune_merge(*arguments, residual=residual, norm=norm_of(8, dtype, device))


# --- gradients


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(device: torch.device, bias: bool) -> None:
    random = torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, 2, 7, 3, dtype=torch.float64, generator=random).to(device)
    importance = torch.rand(2, 7, generator=random).to(device)
    norm = norm_of(3, torch.float64, device, bias=bias, eps=0.1)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, *norm[:2]) if tensor is not None]

    def function(x: Tensor, residual: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.prune_merge(x, importance, 6, 3, residual=residual, norm=ops.Norm(norm[0], *norm[1:], eps=0.1))
        return found.x, found.normalized

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("leaf", ["x", "residual", "weight", "bias"])
def test_fused_where_no_gradient_is_needed(device: torch.device, leaf: str) -> None:
    x, residual = torch.randn(2, 2, 17, 8, device=device)
    norm, importance = norm_of(8, torch.float32, device), torch.rand(2, 16, device=device)
    tensors = {"x": x, "residual": residual, "weight": norm.weight, "bias": norm.bias}
    tensors[leaf].requires_grad_()  # type: ignore[union-attr]
    with CalledOperators() as called:
        smooth = ops.prune_merge(x, importance, 12, 9, residual=residual, norm=norm)
        with torch.no_grad():
            fused = ops.prune_merge(x, importance, 12, 9, residual=residual, norm=norm)
    assert called.names == ["prune_merge", "prune_merge_norm"]
    assert smooth.normalized.requires_grad
    assert not fused.normalized.requires_grad
    torch.testing.assert_close(fused.normalized, smooth.normalized)


def test_the_operator_itself_has_no_gradient(device: torch.device) -> None:
    x, norm = torch.randn(1, 6, 3, device=device, requires_grad=True), norm_of(3, torch.float32, device)
    found = torch.ops.diffrate.prune_merge_norm(x, torch.rand(1, 6, device=device), 5, 3, *norm)
    with pytest.raises(RuntimeError, match=r"ops\.prune_merge\(norm=...\) has one"):
        found[3].sum().backward()


@pytest.mark.parametrize("gradient", [False, True])
def test_autocast(device: torch.device, gradient: bool) -> None:
    """What is normalised has the dtype of x."""
    x = torch.randn(1, 17, 8, device=device).bfloat16().requires_grad_(gradient)
    norm = norm_of(8, torch.bfloat16, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = ops.prune_merge(x, torch.rand(1, 16, device=device), 12, 9, norm=norm)
    assert (found.x.dtype, found.normalized.dtype) == (torch.bfloat16, torch.bfloat16)
    check_normalized(found.normalized, found.x, norm)


# --- errors

X = torch.zeros(2, 6, 3)
ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (torch.nn.LayerNorm(3), InputTypeError, "norm must be a Norm(weight, bias, eps), got LayerNorm"),
        ((ONES, None, 1e-5), InputTypeError, "norm must be a Norm(weight, bias, eps), got tuple"),
        (ops.Norm(None), InputTypeError, "norm.weight must be a tensor (C,), got NoneType"),  # type: ignore[arg-type]
        (ops.Norm(ONES[None]), InputValueError, "norm.weight must be (C,), got shape (1, 3)"),
        (ops.Norm(torch.ones(4)), InputValueError, "norm.weight must be (C,) = (3,), got shape (4,)"),
        (ops.Norm(ONES.half()), InputTypeError, "norm.weight is torch.float16 and x torch.float32"),
        (ops.Norm(ONES.to("meta")), InputValueError, "norm.weight is on meta and x on cpu"),
        (ops.Norm(ONES, 0), InputTypeError, "norm.bias must be a tensor (C,), got int"),  # type: ignore[arg-type]
        (ops.Norm(ONES, torch.ones(1)), InputValueError, "norm.bias must be (C,) = (3,), got shape (1,)"),
        (ops.Norm(ONES, ONES.double()), InputTypeError, "norm.bias is torch.float64 and x torch.float32"),
        (ops.Norm(ONES, ONES.to("meta")), InputValueError, "norm.bias is on meta and x on cpu"),
        (ops.Norm(ONES, ONES, -1e-5), InputValueError, "norm.eps must be finite and at least 0, got -1e-05"),
        (ops.Norm(ONES, ONES, float("nan")), InputValueError, "norm.eps must be finite and at least 0, got nan"),
        (ops.Norm(ONES, ONES, float("inf")), InputValueError, "norm.eps must be finite and at least 0, got inf"),
        (ops.Norm(ONES, ONES, ONES), InputTypeError, "norm.eps must be a float, got Tensor"),  # type: ignore[arg-type]
        (ops.Norm(ONES, ONES, True), InputTypeError, "norm.eps must be a float, got bool"),
    ],
)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_errors(norm: Any, error: type[Exception], message: str, with_gradient: bool) -> None:
    x = X.clone().requires_grad_(with_gradient)
    with pytest.raises(error, match=re.escape(message)) as caught:
        ops.prune_merge(x, torch.zeros(2, 5), 5, 3, norm=norm)
    assert caught.value.__context__ is None  # no terse error of the operator before it


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_weight": torch.ones(4)},
        {"norm_weight": torch.ones(1, 3)},
        {"norm_weight": ONES.half()},
        {"norm_bias": torch.ones(2)},
        {"norm_bias": torch.ones(())},
        {"norm_bias": ONES.double()},
        {"norm_eps": -1.0},
        {"norm_eps": float("nan")},
        {"norm_eps": float("inf")},
        {"x": X[0]},
        {"k_m": -1, "k_p": -1},
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any]) -> None:
    good = {"x": X, "attn": torch.zeros(2, 5), "k_p": 5, "k_m": 3, "norm_weight": ONES, "norm_bias": ONES}
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.prune_merge_norm(**{**good, "norm_eps": 1e-5, **changes})


def test_zero_eps(device: torch.device) -> None:
    x, norm = torch.randn(1, 17, 24, device=device), norm_of(24, torch.float32, device, eps=0)
    found = ops.prune_merge(x, torch.rand(1, 16, device=device), 12, 9, norm=norm)
    check_normalized(found.normalized, found.x, norm)
    found = ops.prune_merge(torch.ones_like(x), torch.rand(1, 16, device=device), 12, 9, norm=norm)
    assert found.normalized.isnan().all()  # as of torch's
