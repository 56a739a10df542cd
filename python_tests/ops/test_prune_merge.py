"""prune_merge: the discrete results exactly or within rounding of the best, the rest given the kernel's own choices."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same, assert_within
from hypothesis import example, given
from match_checks import check_matches
from oracles import sorted_positions
from strategies import CPU, DTYPES, FEATURES, TokenCase, kept_numbers, make_importance, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference

TINY = torch.finfo(torch.float32).tiny


Call = tuple[TokenCase, int, int, dict[str, Any]]


def to(device: torch.device, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    case = draw(token_cases())
    k_p, k_m = draw(kept_numbers(case.tokens, case.prefix))
    options = {
        "mean_rule": draw(st.sampled_from(["mean", "weighted"])),
        "size_rule": draw(st.sampled_from(["cosine", "sum"])),
        "residual": draw(st.sampled_from([None, "like x", "other layout"])),
    }
    return case, k_p, k_m, options


def check_slots(case: TokenCase, x: Tensor, order: Tensor, slot: Tensor, k_p: int, k_m: int) -> None:
    """Kept and pruned tokens exactly; each source within rounding of its best destination, of equal ones the first."""
    position = torch.arange(case.tokens).expand_as(order)
    assert_same("slots of kept tokens", slot.gather(1, order[:, :k_m]), position[:, :k_m])
    assert_same("slots of pruned tokens", slot.gather(1, order[:, k_p:]), torch.full_like(order[:, k_p:], -1))
    match = slot.gather(1, order[:, k_m:k_p])
    check_matches(case, reference.gather_tokens(x, order), match, k_m)


def expected_sizes(order: Tensor, slot: Tensor, k_p: int, k_m: int, size_rule: str) -> Any:
    """Sizes of the merged tokens, for x (after the residual) and size, given order and matching."""

    def compute(x: Tensor, size: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        unit = torch.nn.functional.normalize(x.to(wide), dim=-1)
        size = size.to(wide)
        gained = size
        if size_rule == "cosine":
            holder = order.gather(1, slot.clamp_min(0))  # the input position of the token each one was merged into
            gained = size * (unit * reference.gather_tokens(unit, holder)).sum(-1)
        source = order[:, k_m:k_p]
        own = size.gather(1, order[:, :k_m])
        return own.scatter_add(1, slot.gather(1, source), gained.gather(1, source))

    return compute


# With one channel every cosine is 1 or -1, and rounding decides among rows that are not equal bit for bit.
ONE_CHANNEL = TokenCase(5, 65, 1, 1, torch.float32, features="codebook", importances="signed zeros", seed=7)


@given(call=calls())
@example(call=(ONE_CHANNEL, 8, 3, {"mean_rule": "mean", "size_rule": "cosine", "residual": "like x"}))
def test_results(device: torch.device, call: Call) -> None:
    case, k_p, k_m, options = call
    x, importance, sizes = case.x(), case.importance(), case.plain_size()

    def residual_on(device: torch.device) -> Tensor | None:
        if options["residual"] is None:
            return None
        layout = case.layout if options["residual"] == "like x" else "sliced"
        return replace(case, layout=layout).x(device, salt=4)

    found = ops.prune_merge(
        case.x(device),
        case.importance(device),
        k_p,
        k_m,
        case.size(device),
        prefix=case.prefix,
        mean_rule=options["mean_rule"],
        size_rule=options["size_rule"],
        residual=residual_on(device),
    )
    assert found.x.is_contiguous()
    assert found.slot.is_contiguous()
    out, out_size, slot = (tensor.cpu() for tensor in found)
    order = sorted_positions(case.patch_importance(importance), case.prefix)
    residual = residual_on(CPU)
    added = x if residual is None else x + residual
    check_slots(case, added, order, slot, k_p, k_m)

    # one more column counts what was pruned
    index = torch.where(slot < 0, k_m, slot)
    unmerged = (
        torch.zeros(len(slot), k_m + 1, dtype=torch.int64).scatter_add(1, index, torch.ones_like(slot))[:, :k_m] == 1
    )
    kept = reference.gather_tokens(added, order[:, :k_m])
    assert_same("tokens that nothing merged into", out[unmerged], kept[unmerged])

    weights = sizes.clamp_min(TINY) if options["mean_rule"] == "weighted" else None

    def compute(added: Tensor, weights: Tensor | None) -> Tensor:
        return reference.merge_reduce(added, slot, k_m, weights=weights)

    assert_as_accurate_as_eager("x", out, compute, [added, weights], dtype=case.dtype)

    magnitude = torch.zeros(len(slot), k_m + 1, dtype=torch.float64).scatter_add(1, index, sizes.double().abs())[
        :, :k_m
    ]
    compute_sizes = expected_sizes(order, slot, k_p, k_m, options["size_rule"])
    units = torch.where(magnitude > 0, magnitude, 1)
    assert_as_accurate_as_eager("size", out_size, compute_sizes, [added, sizes], dtype=case.wide, per=units)


def lay_out_attention(attn: Tensor, layout: str) -> Tensor:
    if layout == "queries last":
        return attn.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "heads last":
        return attn.movedim(1, -1).contiguous().movedim(-1, 1)
    return attn[:, :1].expand_as(attn) if layout == "expanded heads" else attn


def dyadic_attention(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/256: sums over heads and queries are exact in float32, so the order of their means is known."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 256, shape, generator=random) / 256).to(dtype)


@given(
    tokens=st.sampled_from([2, 3, 17, 65, 129]),
    heads=st.sampled_from([1, 2, 3, 5, 12, 16, 17]),
    prefix=st.sampled_from([0, 1, 2]),
    kind=st.sampled_from(["rows", "class", "received"]),
    dtype=st.sampled_from(DTYPES),
    attention_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "queries last", "heads last", "expanded heads"]),
    seed=st.integers(0, 99),
)
def test_importance_from_attention(
    device: torch.device,
    tokens: int,
    heads: int,
    prefix: int,
    kind: str,
    dtype: torch.dtype,
    attention_dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    if kind == "class":
        prefix = max(prefix, 1)
    attn = dyadic_attention((2, heads, tokens) if kind == "rows" else (2, heads, tokens, tokens), seed, attention_dtype)
    attn = lay_out_attention(attn.to(device), layout)
    summed = attn.cpu().double()
    if kind != "rows":
        summed = summed[:, :, 0] if kind == "class" else summed.sum(2)
    order = sorted_positions(summed.sum(1)[:, prefix:], prefix)

    x = torch.randn(2, tokens, 8).to(dtype)
    options: dict[str, Any] = {"prefix": prefix, "importance_from": "received" if kind == "received" else "class"}
    kept = max(prefix, 1)
    out, _, slot = ops.prune_merge(x.to(device), attn, kept, kept, **options)
    expected = torch.full((2, tokens), -1)
    expected.scatter_(1, order[:, :kept], torch.arange(kept).expand(2, -1))
    assert_same("slot", slot, expected)
    assert_same("x", out, reference.gather_tokens(x, order[:, :kept]))
    full = ops.prune_merge(x.to(device), attn, tokens, tokens, **options).slot
    assert_same("order", full.cpu().argsort(1), order)


@pytest.mark.parametrize("mean_rule", ["mean", "weighted"])
@pytest.mark.parametrize("size_rule", ["cosine", "sum"])
@pytest.mark.parametrize(("tokens", "k_p", "k_m"), [(197, 168, 156), (197, 197, 99), (577, 500, 300)])
def test_the_reference_agrees(
    device: torch.device, mean_rule: str, size_rule: str, tokens: int, k_p: int, k_m: int
) -> None:
    """Everything at once, where no two cosines are near each other: float64 throughout."""
    random = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, 2, tokens, 48, generator=random, dtype=torch.float64)
    attn = torch.rand(2, 3, tokens, generator=random)
    size = 1 + torch.rand(2, tokens, generator=random, dtype=torch.float64)
    options: dict[str, Any] = {"mean_rule": mean_rule, "size_rule": size_rule}
    expected = reference.prune_merge(x, attn, k_p, k_m, size, residual=residual, **options)
    x, attn, size, residual = to(device, x, attn, size, residual)
    out, out_size, slot = ops.prune_merge(x, attn, k_p, k_m, size, residual=residual, **options)
    assert_same("slot", slot, expected[2])
    torch.testing.assert_close(out.cpu(), expected[0])
    torch.testing.assert_close(out_size.cpu(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vit_layer(device: torch.device, dtype: torch.dtype) -> None:
    """DeiT-S at full size, where the kernels' blocks and vectors are full."""
    case = TokenCase(2, 197, 384, 1, dtype, features="clustered", sizes="random", importances="random")
    x, importance, size = case.x(), case.importance(), case.size()
    out, _, slot = ops.prune_merge(*to(device, x, importance), 168, 120, *to(device, size))
    order = sorted_positions(case.patch_importance(importance), 1)
    check_slots(case, x, order, slot.cpu(), 168, 120)

    def compute(x: Tensor) -> Tensor:
        return reference.merge_reduce(x, slot.cpu(), 120)

    assert_as_accurate_as_eager("x", out, compute, [x], dtype=dtype)


def test_equal_tokens_go_to_the_first(device: torch.device) -> None:
    x = torch.ones(1, 9, 5, device=device)
    out, size, slot = ops.prune_merge(x, torch.zeros(1, 8, device=device), 8, 3)
    assert slot.tolist() == [[0, 1, 2, 1, 1, 1, 1, 1, -1]]
    assert_same("x", out, torch.ones(1, 3, 5))
    torch.testing.assert_close(size.cpu(), torch.tensor([[1.0, 6.0, 1.0]]))


def test_ties_over_several_blocks_and_parts(device: torch.device) -> None:
    """Destinations that are compared by different threads and in different blocks."""
    directions = torch.eye(4)
    for first in (1, 7, 8, 9, 63, 64, 100):
        x = directions[1].repeat(1, 130, 1)
        x[:, first:120:7] = 2 * directions[2]  # the first, and more like it
        x[:, 120:] = directions[2]
        slot = ops.prune_merge(x.to(device), torch.zeros(1, 130, device=device), 130, 120)[2]
        assert_same("match", slot[:, 120:], torch.full((1, 10), first))


def test_opposite_tokens_make_negative_sizes(device: torch.device) -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], device=device)
    importance = torch.tensor([[2.0, 1.0]], device=device)
    size = torch.tensor([[1.0, 1.0, 3.0]], device=device)
    out, out_size, slot = ops.prune_merge(x, importance, 3, 2, size)
    assert slot.tolist() == [[0, 1, 1]]
    assert out_size.tolist() == [[1.0, -2.0]]
    assert out.tolist() == [[[1.0, 0.0], [0.0, 0.0]]]
    assert ops.prune_merge(x, importance, 3, 2, size, size_rule="sum")[1].tolist() == [[1.0, 4.0]]
    weighted = ops.prune_merge(x, importance, 3, 2, size, mean_rule="weighted").x
    assert weighted.tolist() == [[[1.0, 0.0], [-0.5, 0.0]]]


@pytest.mark.parametrize("size", [0.0, -5.0, -torch.inf])
def test_weights_below_the_smallest_float_count_as_that(device: torch.device, size: float) -> None:
    x = torch.tensor([[[0.0], [1.0], [3.0]]], device=device)
    sizes = torch.tensor([[1.0, size, size]], device=device)
    importance = torch.tensor([[2.0, 1.0]], device=device)
    out = ops.prune_merge(x, importance, 3, 2, sizes, mean_rule="weighted")[0]
    assert out.tolist() == [[[0.0], [2.0]]]


@given(
    case=token_cases(features=["normal"], least_tokens=17),
    bits=st.sampled_from(["any", "infinite", "huge", "subnormal"]),
    data=st.data(),
)
def test_any_features_give_valid_slots(device: torch.device, case: TokenCase, bits: str, data: st.DataObject) -> None:
    """Overflowing and invalid features: results may be NaN, but every token has its place."""
    k_p, k_m = data.draw(kept_numbers(case.tokens, case.prefix))
    random = torch.Generator().manual_seed(case.seed)
    x = case.x().clone()
    wild = torch.rand(x.shape[:2], generator=random) < 0.5
    kinds = {"infinite": torch.inf, "huge": torch.finfo(case.dtype).max, "subnormal": torch.finfo(case.dtype).tiny / 4}
    if bits == "any":
        values = torch.randint(-(2**15), 2**15, x.shape, generator=random).short()
        values = values.view(torch.bfloat16).to(case.dtype)
    else:
        values = torch.full_like(x, kinds[bits])
    x = torch.where(wild[..., None], values, x)
    importance = case.importance()
    _, _, slot = ops.prune_merge(*to(device, x, importance), k_p, k_m, prefix=case.prefix)
    slot = slot.cpu()
    order = sorted_positions(case.patch_importance(importance), case.prefix)
    position = torch.arange(case.tokens).expand_as(order)
    assert_same("slots of kept tokens", slot.gather(1, order[:, :k_m]), position[:, :k_m])
    assert_same("slots of pruned tokens", slot.gather(1, order[:, k_p:]), torch.full_like(order[:, k_p:], -1))
    match = slot.gather(1, order[:, k_m:k_p])
    assert ((match >= case.prefix) & (match < k_m)).all()


@pytest.mark.parametrize("where", ["source", "destination", "both"])
def test_nan_features_are_similar_to_nothing(device: torch.device, where: str) -> None:
    x = torch.eye(6).repeat(1, 1, 1)
    x[0, 4:, 1] = 0.25  # of both sources the most similar is position 1,
    x[0, 4, 2] = 1.0  # but of this one position 2
    if where != "destination":
        x[0, 5, 0] = torch.nan
    if where != "source":
        x[0, 2, 3] = torch.nan
    out, size, slot = ops.prune_merge(x.to(device), torch.zeros(1, 5, device=device), 6, 4)
    expected = {"source": [2, 1], "destination": [1, 1], "both": [1, 1]}[where]
    assert slot.tolist() == [[0, 1, 2, 3, *expected]]
    assert size.isnan().tolist() == [[False, where != "destination", False, False]]
    assert out[0, 3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_residual_of_another_dtype(device: torch.device, dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 1, 17, 8)
    x, residual = x.to(dtype), residual.to(residual_dtype)
    importance = torch.rand(1, 16)
    out, _, slot = ops.prune_merge(*to(device, x, importance), 9, 9, residual=residual.to(device))
    order = sorted_positions(importance, 1)
    assert_same("x", out, reference.gather_tokens(x + residual, order[:, :9]))
    assert int((slot >= 0).sum()) == 9


@given(call=calls())
def test_gradient(device: torch.device, call: Call) -> None:
    case, k_p, k_m, options = call
    case = replace(case, features="normal")
    x = case.x(device).requires_grad_()
    residual = None if options["residual"] is None else case.x(device, salt=4).requires_grad_()
    importance, size = case.importance(device), case.size(device)
    out, out_size, slot = ops.prune_merge(
        x, importance, k_p, k_m, size, prefix=case.prefix, mean_rule=options["mean_rule"], residual=residual
    )
    assert not out_size.requires_grad
    gradient = case.gradient(k_m)
    out.backward(gradient.to(device))
    weights = case.plain_size().clamp_min(TINY) if options["mean_rule"] == "weighted" else None
    target = slot.cpu()

    def compute(gradient: Tensor, weights: Tensor | None) -> Tensor:
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        share = torch.ones(target.shape, dtype=wide) if weights is None else weights.to(wide)
        share = torch.where(target < 0, 0, share)
        total = torch.zeros(target.shape[0], k_m + 1, dtype=wide).scatter_add(1, target % (k_m + 1), share)
        share = share / total.gather(1, target.clamp_min(0)) if k_m > 0 else share
        share = torch.where(target < 0, 0, share)
        rows = reference.gather_tokens(gradient, target.clamp_min(0)) if k_m > 0 else torch.zeros(x.shape)
        return (rows.to(wide) * share[..., None]).to(gradient.dtype)

    assert x.grad is not None
    assert_as_accurate_as_eager("gradient of x", x.grad, compute, [gradient, weights], dtype=case.dtype)
    if residual is not None:
        assert residual.grad is not None
        assert_same("gradient of residual", residual.grad, x.grad)


@pytest.mark.parametrize("mean_rule", ["mean", "weighted"])
def test_gradcheck(device: torch.device, mean_rule: Any) -> None:
    random = torch.Generator().manual_seed(3)
    x, residual = (
        torch.randn(2, 7, 3, dtype=torch.float64, generator=random).to(device).requires_grad_() for _ in range(2)
    )
    importance = torch.rand(2, 7, generator=random).to(device)
    size = (1 + torch.rand(2, 7, generator=random)).double().to(device)

    def function(x: Tensor, residual: Tensor) -> Tensor:
        return ops.prune_merge(x, importance, 6, 3, size, mean_rule=mean_rule, residual=residual)[0]

    assert torch.autograd.gradcheck(function, [x, residual])
    assert torch.autograd.gradgradcheck(function, [x, residual])


def test_attention_and_size_are_constants(device: torch.device) -> None:
    x = torch.randn(1, 6, 2, device=device, requires_grad=True)
    attn = torch.rand(1, 2, 6, 6, device=device, requires_grad=True)
    size = torch.ones(1, 6, device=device, requires_grad=True)
    out, out_size, _ = ops.prune_merge(x, attn, 5, 3, size)
    assert not out_size.requires_grad
    out.sum().backward()
    assert attn.grad is None
    assert size.grad is None


@pytest.mark.parametrize("features", FEATURES)
def test_reference_slots_are_valid_for_every_kind_of_features(features: str) -> None:
    """The oracle itself, on the kinds of features that the operator is tested with."""
    case = TokenCase(2, 33, 8, 1, torch.float32, features=features)
    x, importance = case.x(), make_importance("random", (2, 32), torch.float32, torch.Generator())
    _, _, slot = reference.prune_merge(x, importance, 30, 12)
    check_slots(case, x, sorted_positions(importance, 1), slot, 30, 12)


X = torch.zeros(2, 6, 3)
GOOD: dict[str, Any] = {"x": X, "attn": torch.zeros(2, 5), "k_p": 5, "k_m": 3}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 3.0}, InputTypeError, "x must be a tensor (B, N, C), got float"),
        ({"x": X[0]}, InputValueError, "x must be (B, N, C), got shape (6, 3)"),
        ({"x": X.int()}, InputTypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"attn": None}, InputTypeError, "attn must be a tensor (B, H, N, N), its class rows (B, H, N)"),
        ({"attn": torch.zeros(5)}, InputValueError, "attn must be (B, H, N, N)"),
        ({"attn": torch.zeros(2, 5).int()}, InputTypeError, "attn must be float32"),
        ({"attn": torch.zeros(2, 4)}, InputValueError, "(B, N-P) = (2, 5) or (B, N) = (2, 6), got shape (2, 4)"),
        ({"attn": torch.zeros(3, 5)}, InputValueError, "got shape (3, 5)"),
        (
            {"attn": torch.zeros(2, 4, 5)},
            InputValueError,
            "attn must be (B, H, N, N) or (B, H, N) = (2, 4, 6), got shape (2, 4, 5)",
        ),
        ({"attn": torch.zeros(2, 4, 6, 5)}, InputValueError, "= (2, 4, 6, 6), got shape (2, 4, 6, 5)"),
        ({"attn": torch.zeros(2, 4, 1, 6)}, InputValueError, "= (2, 4, 6, 6), got shape (2, 4, 1, 6)"),
        ({"attn": torch.zeros(2, 0, 6)}, InputValueError, "attn must have at least one head, got shape (2, 0, 6)"),
        (
            {"attn": torch.zeros(2, 1, 6, 6), "prefix": 0},
            InputValueError,
            "importance_from='class' needs a class token",
        ),
        ({"attn": torch.zeros(2, 5, device="meta")}, InputValueError, "on meta and x on cpu"),
        ({"attn": torch.zeros(2, 1, 6, device="meta")}, InputValueError, "attn is on meta and x on cpu"),
        ({"k_p": 7}, InputValueError, "k_p must be at most the number of tokens, 6, got 7"),
        ({"k_p": 2}, InputValueError, "k_m must be at most k_p, 2, got 3"),
        ({"k_m": 1}, InputValueError, "k_m must be at least 2 (the prefix and one token to merge into), got 1"),
        ({"k_p": 0, "k_m": 0}, InputValueError, "k_p must be at least 1 (the prefix), got 0"),
        ({"k_m": -3}, InputValueError, "k_m must be at least 2"),
        ({"k_p": -1, "k_m": -1}, InputValueError, "k_p must be at least 1"),
        ({"k_p": 5.0}, InputTypeError, "k_p must be an int, got float"),
        ({"k_m": True}, InputTypeError, "k_m must be an int, got bool"),
        ({"k_m": torch.tensor(3)}, InputTypeError, "k_m must be an int, got Tensor"),
        ({"size": torch.ones(2, 5)}, InputValueError, "size must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"size": torch.ones(2, 6).long()}, InputTypeError, "size must be float32"),
        ({"size": torch.ones(2, 6, device="meta")}, InputValueError, "size is on meta and x on cpu"),
        ({"prefix": 7}, InputValueError, "prefix must be at most the number of tokens, 6, got 7"),
        ({"prefix": -1}, InputValueError, "prefix must be at least 0, got -1"),
        ({"importance_from": "cls"}, InputValueError, "importance_from must be one of 'class', 'received', got 'cls'"),
        ({"mean_rule": None}, InputValueError, "mean_rule must be one of 'mean', 'weighted', got None"),
        ({"size_rule": "max"}, InputValueError, "size_rule must be one of 'cosine', 'sum', got 'max'"),
        ({"residual": 1}, InputTypeError, "residual must be a tensor (B, N, C), got int"),
        ({"residual": X[:, :5]}, InputValueError, "residual must be the shape of x = (2, 6, 3), got shape (2, 5, 3)"),
        ({"residual": X[0]}, InputValueError, "residual must be (B, N, C), got shape (6, 3)"),
        ({"residual": X.int()}, InputTypeError, "residual must be float32"),
        ({"residual": X.to("meta")}, InputValueError, "residual is on meta and x on cpu"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**GOOD, **changes}
    with pytest.raises(error, match=re.escape(message)):
        ops.prune_merge(**arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": X[0]},
        {"x": X.long()},
        {"attn": torch.zeros(10)},
        {"attn": torch.zeros(2, 4)},
        {"attn": torch.zeros(1, 5)},
        {"attn": torch.zeros(2, 1, 5)},
        {"attn": torch.zeros(2, 0, 6)},
        {"attn": torch.zeros(2, 1, 5, 6)},
        {"attn": torch.zeros(2, 1, 6, 6, 1)},
        {"attn": torch.zeros(2, 5).int()},
        {"k_p": 7},
        {"k_p": 2},
        {"k_m": 1},
        {"k_m": 0, "k_p": 0},
        {"k_m": -1, "k_p": -1},
        {"size": torch.ones(2, 5)},
        {"size": torch.ones(2, 6).double()},
        {"prefix": -1},
        {"prefix": 7},
        {"importance_from": "cls"},
        {"mean_rule": "max"},
        {"size_rule": ""},
        {"residual": X[:, :5]},
        {"residual": X.half()},
        {"residual": X[:1]},
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.prune_merge(**{**GOOD, **changes})


@pytest.mark.parametrize("with_norm", [False, True])
def test_gradients_under_vmap(with_norm: bool) -> None:
    """A transform's tensors do not tell that a gradient is wanted of them."""
    x = torch.randn(3, 2, 17, 8, dtype=torch.float64, requires_grad=True)
    importance = torch.rand(3, 2, 16, dtype=torch.float64)
    norm = ops.Norm(torch.rand(8, dtype=torch.float64)) if with_norm else None

    def result(operator: Any, x: Tensor, importance: Tensor) -> Tensor:
        found = operator(x, importance, 12, 8, norm=norm)
        return found[-1] if with_norm else found[0]

    mapped = torch.func.vmap(lambda x, importance: result(ops.prune_merge, x, importance))(x, importance)
    (actual,) = torch.autograd.grad(mapped.square().sum(), x)
    one_by_one = torch.stack([result(reference.prune_merge, *pair) for pair in zip(x, importance, strict=True)])
    (expected,) = torch.autograd.grad(one_by_one.square().sum(), x)
    assert_within("gradient", actual, expected, 1e-9)
