"""masked_prune_merge: order exactly, matches within rounding of the best, the rest given the kernel's own choices."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given
from masked_prune_merge_calls import Call, calls, given_choices
from match_checks import check_matches
from strategies import DTYPES, TokenCase
from torch import Tensor

import diffrate_ext
from diffrate_ext import InputTypeError, InputValueError, ops, reference


@given(call=calls())
def test_results(device: torch.device, call: Call) -> None:
    case = call.case
    found = ops.masked_prune_merge(*call.inputs(device), **call.options)
    for tensor in found:
        assert tensor.is_contiguous()
    out, out_mask, out_size, order, dst = (tensor.cpu() for tensor in found)
    assert_same("order", order, call.order())
    _, middle, left = call.numbers()
    position = torch.arange(case.tokens).expand_as(order)
    sorted_x = reference.gather_tokens(case.x(), order)
    assert_same("what no merging moves", dst[:, :left], position[:, :left])
    assert_same("what was masked before", dst[:, middle:], position[:, middle:])
    check_matches(case, sorted_x, dst[:, left:middle], left)

    merged_into = torch.zeros_like(order).scatter_add(1, dst, torch.ones_like(order)) > 1
    assert_same("x of tokens that nothing merged into", out[~merged_into], sorted_x[~merged_into])
    compute = given_choices(call, order, dst)
    inputs = [case.x(), call.mask(), call.case.plain_size(), *call.probabilities()]
    assert_as_accurate_as_eager("x", out, lambda *args: compute(*args)[0], inputs, dtype=case.dtype)
    assert_same("mask", out_mask, compute(*inputs)[1])

    terms = call.case.plain_size().double().abs().gather(1, order).clamp_min(1)
    magnitude = terms.scatter_add(1, dst[:, left:middle], terms[:, left:middle])
    assert_as_accurate_as_eager(
        "size", out_size, lambda *args: compute(*args)[2], inputs, dtype=case.wide, per=magnitude
    )


# --- what it does, by hand


def test_by_hand(device: torch.device) -> None:
    x = torch.tensor([[[9.0, 9], [0, 1], [1, 0], [3, 0], [0, 2], [1, 1]]], device=device)
    importance = torch.tensor([[0.4, 0.5, 0.3, 0.2, 0.1]], device=device)
    size = torch.tensor([[1.0, 2, 1, 3, 0.5, 1]], device=device)
    mask, prob = torch.ones(1, 6, device=device), torch.full((6,), 0.5, device=device)
    kept = [torch.tensor(float(number), device=device) for number in (5, 3)]
    out, out_mask, out_size, order, dst = ops.masked_prune_merge(x, mask, importance, size, prob, prob, *kept)
    assert order.tolist() == [[0, 2, 1, 3, 4, 5]]
    assert dst.tolist() == [[0, 1, 2, 1, 2, 5]]  # (3, 0) goes to (1, 0), (0, 2) to (0, 1); the last one is pruned
    assert out.tolist() == [[[9.0, 9], [2, 0], [0, 1.5], [3, 0], [0, 2], [1, 1]]]
    assert out_mask.tolist() == [[1.0, 1, 1, 0, 0, 0]]
    assert out_size.tolist() == [[1.0, 4, 3, 3, 1, 1]]  # a source counts 1 or more
    plain = ops.masked_prune_merge(x, mask, importance, size, prob, prob, *kept, size_rule="sum").size
    assert plain.tolist() == [[1.0, 4, 3, 3, 1, 1]]


def test_opposite_tokens_count_as_one(device: torch.device) -> None:
    """Negative cosines would make sizes negative: in the search step, unlike at inference, no size is less than 1."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], device=device)
    importance, size = torch.tensor([[2.0, 1.0]], device=device), torch.tensor([[0.5, 0.25, 3.0]], device=device)
    ones = torch.ones(1, 3, device=device)
    kept = [torch.tensor(3.0, device=device), torch.tensor(2.0, device=device)]
    result = ops.masked_prune_merge(x, ones, importance, size, ones[0], ones[0], *kept)
    assert result[2].tolist() == [[1.0, 2.0, 1.0]]
    result = ops.masked_prune_merge(x, ones, importance, size, ones[0], ones[0], *kept, size_rule="sum")
    assert result[2].tolist() == [[1.0, 4.0, 3.0]]
    kept[1].fill_(3)
    result = ops.masked_prune_merge(x, ones, importance, size, ones[0], ones[0], *kept)
    assert_same("size where nothing is merged", result[2], size)


def test_masked_tokens_are_neither_sources_nor_destinations(device: torch.device) -> None:
    x = torch.ones(1, 7, 3, device=device)
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 0, 1]], device=device)
    importance = torch.tensor([[0.5, 0.0, 0.6, 0.7, 0.0, 0.4]], device=device)
    prob = torch.ones(7, device=device)
    kept = [torch.tensor(9.0, device=device), torch.tensor(3.0, device=device)]
    _, out_mask, size, order, dst = ops.masked_prune_merge(x, mask, importance, None, prob, prob, *kept)
    assert order.tolist() == [[0, 4, 3, 1, 6, 2, 5]]
    assert dst.tolist() == [[0, 1, 2, 1, 1, 5, 6]]
    assert out_mask.tolist() == [[1.0, 1, 1, 0, 0, 0, 0]]
    torch.testing.assert_close(size.cpu(), torch.tensor([[1.0, 3, 1, 1, 1, 1, 1]]))


@pytest.mark.parametrize("sizes", [None, "random"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("k_p", "k_m"), [(50, 30), (65, 30), (40, 40), (65, 65), (65, 64), (5, 4)])
def test_first_compression_is_that_of_inference(
    device: torch.device, k_p: int, k_m: int, prefix: int, sizes: str | None
) -> None:
    """Where nothing is masked yet, what stays alive is what prune_merge keeps."""
    case = TokenCase(2, 65, 16, prefix, torch.float64, sizes=sizes, seed=k_p)
    call = Call(case, "all", k_p, k_m, "sum")
    inputs = call.inputs(device)
    out, mask, size, order, dst = ops.masked_prune_merge(*inputs, **call.options)
    x, importance, given = inputs[0], inputs[2], inputs[3]
    kept, kept_size, slot = ops.prune_merge(x, importance, k_p, k_m, given, prefix=prefix, size_rule="sum")
    torch.testing.assert_close(out[:, :k_m], kept)
    torch.testing.assert_close(size[:, :k_m], kept_size)  # sizes of 1 and more, so that the clamp changes none
    assert_same("mask", mask, (torch.arange(65) < k_m).double().expand(2, -1))
    moved = torch.empty_like(dst).scatter_(1, order, torch.where(torch.arange(65, device=device) < k_p, dst, -1))
    assert_same("slot", moved, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vit_layer(device: torch.device, dtype: torch.dtype) -> None:
    """DeiT-S at full size, where the kernels' blocks and vectors are full."""
    case = TokenCase(2, 197, 384, 1, dtype, features="clustered", sizes="random")
    call = Call(case, "some", 120, 100)
    out, mask, _, order, dst = (t.cpu() for t in ops.masked_prune_merge(*call.inputs(device)))
    assert_same("order", order, call.order())
    check_matches(case, reference.gather_tokens(case.x(), order), dst[:, 100:120], 100)
    assert_same("mask", mask, (torch.arange(197) < 100).to(mask.dtype).expand(2, -1))
    inputs = [case.x(), call.mask(), call.case.plain_size(), *call.probabilities()]
    compute = given_choices(call, order, dst)
    assert_as_accurate_as_eager("x", out, lambda *args: compute(*args)[0], inputs, dtype=dtype)


# --- special values


def test_constants(device: torch.device) -> None:
    call = Call(TokenCase(2, 9, 3, 1, torch.float32, sizes="random"), "all", 7, 4)
    inputs = [tensor.requires_grad_() for tensor in call.inputs(device)]
    out, out_mask, out_size, _, _ = ops.masked_prune_merge(*inputs)
    assert not out_size.requires_grad
    (out.square().sum() + out_mask.sum()).backward()
    has_gradient = [tensor.grad is not None for tensor in inputs]
    assert has_gradient == [True, True, False, False, True, True, False, False]


def test_values_of_the_probabilities_are_not_used(device: torch.device) -> None:
    call = Call(TokenCase(2, 17, 4, 1, torch.float32), "some", 9, 6)
    inputs = call.inputs(device)
    expected = ops.masked_prune_merge(*inputs)
    inputs[4] = torch.full_like(inputs[4], -3.0)
    inputs[5] = torch.full_like(inputs[5], 1e6)
    for a, b in zip(ops.masked_prune_merge(*inputs), expected, strict=True):
        assert_same("result", a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("number", "whole"), [(12.4, 12), (12.5, 13), (12.6, 13), (11.5, 12), (16.5, 17), (6.5, 7)])
def test_numbers_count_as_the_nearest_whole_ones(
    device: torch.device, number: float, whole: int, dtype: torch.dtype
) -> None:
    case = TokenCase(2, 17, 4, 1, dtype, sizes="random")
    for kept_p, kept_m, rounded in (
        (number, 5, (whole, 5)),
        (17, number, (17, whole)),
        (number, number, (whole, whole)),
    ):
        found = ops.masked_prune_merge(*Call(case, "all", kept_p, kept_m).inputs(device))
        expected = ops.masked_prune_merge(*Call(case, "all", *rounded).inputs(device))
        for name, a, b in zip(found._fields, found, expected, strict=True):
            assert_same(name, a, b)


@pytest.mark.parametrize("most", [10.0, 1e9, 1e30, torch.inf])
def test_numbers_above_all_tokens_keep_all(device: torch.device, most: float) -> None:
    call = Call(TokenCase(2, 9, 3, 1, torch.float32), "all", 9, 9)
    inputs = call.inputs(device)
    expected = ops.masked_prune_merge(*inputs)
    inputs[6].fill_(most)
    inputs[7].fill_(most)
    for a, b in zip(ops.masked_prune_merge(*inputs), expected, strict=True):
        assert_same("result", a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_masks_sizes_and_rates_of_another_dtype(device: torch.device, dtype: torch.dtype, other: torch.dtype) -> None:
    """Small whole numbers, which every dtype has."""
    call = Call(replace(TokenCase(2, 17, 4, 1, torch.float32, sizes="ones"), dtype=dtype), "some", 9, 6)
    inputs = call.inputs(device)
    expected = ops.masked_prune_merge(*inputs)
    converted = [
        inputs[0],
        *(tensor.to(other) for tensor in inputs[1:2]),
        inputs[2],
        *(t.to(other) for t in inputs[3:]),
    ]
    converted[1].requires_grad_()
    converted[4].requires_grad_()
    actual = ops.masked_prune_merge(*converted)
    for a, b in zip(actual, expected, strict=True):
        assert_same("result", a, b)
    actual[1].sum().backward()
    assert converted[1].grad.dtype == converted[4].grad.dtype == other


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("kept", [1, 6])
def test_few_images_and_tokens(device: torch.device, images: int, kept: int) -> None:
    x = torch.zeros(images, 6, 3, device=device, requires_grad=True)
    mask = torch.ones(images, 6, device=device, requires_grad=True)
    importance, prob = torch.zeros(images, 5, device=device), torch.ones(6, device=device, requires_grad=True)
    number = torch.tensor(float(kept), device=device)
    out, out_mask, size, order, dst = ops.masked_prune_merge(x, mask, importance, None, prob, prob, number, number)
    assert out.shape == (images, 6, 3)
    assert out_mask.shape == size.shape == order.shape == dst.shape == (images, 6)
    assert out_mask.sum() == images * kept
    (out.sum() + out_mask.sum()).backward()
    assert mask.grad is not None
    assert mask.grad.shape == (images, 6)


# --- errors

X = torch.zeros(2, 6, 3)
ONES = torch.ones(2, 6)
GOOD: dict[str, Any] = {
    "x": X,
    "mask": ONES,
    "importance": torch.zeros(2, 5),
    "size": None,
    "prune_prob": ONES[0],
    "merge_prob": ONES[0],
    "kept_p": torch.tensor(5.0),
    "kept_m": torch.tensor(3.0),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 3.0}, InputTypeError, "x must be a tensor (B, N, C), got float"),
        ({"x": X[0]}, InputValueError, "x must be (B, N, C), got shape (6, 3)"),
        ({"x": X.int()}, InputTypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"mask": None}, InputTypeError, "mask must be a tensor (B, N), got NoneType"),
        ({"mask": ONES[:, :5]}, InputValueError, "mask must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"mask": ONES[0]}, InputValueError, "mask must be (B, N), got shape (6,)"),
        ({"mask": ONES.bool()}, InputTypeError, "mask must be float32"),
        ({"mask": ONES.to("meta")}, InputValueError, "mask is on meta and x on cpu"),
        ({"mask": ONES * 3}, InputValueError, "mask must lie in 0 .. 1, but its first row adds up to 18"),
        ({"mask": ONES * torch.nan}, InputValueError, "mask must lie in 0 .. 1, but its first row adds up to nan"),
        ({"importance": None}, InputTypeError, "importance must be a tensor (B, N-P) or (B, N), got NoneType"),
        ({"importance": torch.zeros(2, 4)}, InputValueError, "(B, N-P) = (2, 5) or (B, N) = (2, 6), got shape (2, 4)"),
        ({"importance": torch.zeros(2, 5).int()}, InputTypeError, "importance must be float32"),
        ({"importance": torch.zeros(2, 5, device="meta")}, InputValueError, "importance is on meta and x on cpu"),
        ({"size": ONES[:, :5]}, InputValueError, "size must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"size": ONES.long()}, InputTypeError, "size must be float32"),
        ({"prune_prob": ONES}, InputValueError, "prune_prob must be (N,), got shape (2, 6)"),
        ({"prune_prob": ONES[0, :5]}, InputValueError, "prune_prob must be (N,) = (6,), got shape (5,)"),
        ({"merge_prob": None}, InputTypeError, "merge_prob must be a tensor (N,), got NoneType"),
        ({"merge_prob": ONES[0].to("meta")}, InputValueError, "merge_prob is on meta and x on cpu"),
        ({"kept_p": 5.0}, InputTypeError, "kept_p must be a tensor 0-d, got float"),
        ({"kept_p": ONES[0, :1]}, InputValueError, "kept_p must be 0-d, got shape (1,)"),
        ({"kept_m": torch.tensor(3)}, InputTypeError, "kept_m must be float32"),
        (
            {"kept_m": torch.tensor(1.0)},
            InputValueError,
            "kept_m must be at least 2 (the prefix and one token to merge into)",
        ),
        ({"kept_m": torch.tensor(-1.0)}, InputValueError, "kept_m must be at least 2"),
        ({"kept_m": torch.tensor(torch.nan)}, InputValueError, "kept_m must be at least 2"),
        ({"kept_p": torch.tensor(0.0)}, InputValueError, "kept_p must be at least the prefix, 1, got 0"),
        ({"kept_p": torch.tensor(torch.nan)}, InputValueError, "kept_p must be at least the prefix, 1, got nan"),
        ({"prefix": 7}, InputValueError, "prefix must be at most the number of tokens, 6, got 7"),
        ({"prefix": -1}, InputValueError, "prefix must be at least 0, got -1"),
        ({"size_rule": "max"}, InputValueError, "size_rule must be one of 'cosine', 'sum', got 'max'"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.masked_prune_merge(**{**GOOD, **changes})


def test_numbers_are_judged_as_they_count() -> None:
    """To the nearest whole number: 1.5 is two tokens, and enough beside a prefix of one."""
    kept = {"kept_p": torch.tensor(0.6), "kept_m": torch.tensor(0.6)}
    assert ops.masked_prune_merge(**{**GOOD, **kept}).mask.tolist() == [[1.0, 0, 0, 0, 0, 0]] * 2
    kept = {"kept_p": torch.tensor(3.2), "kept_m": torch.tensor(1.5)}
    assert ops.masked_prune_merge(**{**GOOD, **kept}).mask.tolist() == [[1.0, 1, 0, 0, 0, 0]] * 2
    with pytest.raises(InputValueError, match="kept_m must be at least 2"):
        ops.masked_prune_merge(**{**GOOD, "kept_m": torch.tensor(1.4)})


@pytest.mark.parametrize(
    "changes",
    [
        {"x": X[0]},
        {"x": X.long()},
        {"mask": ONES[:, :5]},
        {"mask": ONES[:1]},
        {"mask": ONES[0]},
        {"mask": ONES.double()},
        {"mask": ONES.bool()},
        {"importance": torch.zeros(2, 4)},
        {"importance": torch.zeros(1, 5)},
        {"importance": torch.zeros(10)},
        {"importance": torch.zeros(2, 5).int()},
        {"size": ONES[:, :5]},
        {"size": ONES.double()},
        {"prune_prob": ONES},
        {"merge_prob": ONES[0, :5]},
        {"kept_p": ONES[0, :1]},
        {"kept_p": torch.tensor(5.0).double()},
        {"kept_p": torch.tensor(5)},
        {"prefix": -1},
        {"prefix": 7},
        {"size_rule": ""},
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.masked_prune_merge(**{**GOOD, **changes})


NONSENSE = [
    {"mask": ONES * 3},
    {"mask": -ONES},
    {"mask": ONES * torch.nan},
    {"kept_p": torch.tensor(-1.0)},
    {"kept_p": torch.tensor(torch.nan)},
    {"kept_p": torch.tensor(0.0)},
    {"kept_m": torch.tensor(torch.nan)},
    {"kept_m": torch.tensor(1.0)},
    {"kept_m": torch.tensor(-1.0)},
]


@pytest.mark.parametrize("changes", NONSENSE)
def test_numbers_that_make_no_sense(device: torch.device, changes: dict[str, Any]) -> None:
    """The CPU refuses them; CUDA, which reads them on the device, stays in bounds and keeps all tokens."""
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in {**GOOD, **changes}.items()
    }
    if device.type == "cpu" and diffrate_ext.build_info()["cuda_architectures"] != ["emulated"]:
        with pytest.raises(RuntimeError, match="diffrate: "):
            torch.ops.diffrate.masked_prune_merge(**arguments)
        return
    arguments["x"] = torch.randn(2, 6, 3, device=device)
    out, _, _, order, dst = (result.cpu() for result in torch.ops.diffrate.masked_prune_merge(**arguments))
    assert_same("order", order.sort(1).values, torch.arange(6).expand(2, -1))
    assert out.isfinite().all()
    assert int(dst.min()) >= 0
    assert int(dst.max()) < 6
