"""masked_prune_merge: order exactly, matches within rounding of the best, the rest given the kernel's own choices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given, settings
from match_checks import check_matches
from oracles import sorted_positions
from strategies import DTYPES, FEATURES, TokenCase, token_cases
from torch import Tensor

import diffrate_ext
from diffrate_ext import ops, reference

ALIVE = ("all", "some", "one patch", "anywhere")


@dataclass(frozen=True)
class Call:
    """Tokens of which some are masked already, and the numbers to keep of the others.

    "anywhere": masked tokens may be important, and sorted before others that are alive.
    """

    case: TokenCase
    alive: str
    kept_p: int
    kept_m: int
    sizes: str

    def mask(self) -> Tensor:
        """The same number alive in every image, and all of the prefix."""
        case = self.case
        patches = case.tokens - case.prefix
        left = {"all": patches, "one patch": min(1, patches)}.get(self.alive, (2 * patches + 2) // 3)
        random = torch.rand(case.images, patches, generator=torch.Generator().manual_seed(case.seed + 5))
        mask = torch.ones(case.images, case.tokens, dtype=case.wide)
        mask[:, case.prefix :] = (random.argsort(1).argsort(1) < left).to(case.wide)
        return mask

    def importance(self) -> Tensor:
        """Tokens that are masked are the least important, as masked_attention has it, and so sorted last."""
        case = self.case
        values = case.importance()
        if self.alive == "anywhere":
            return values
        patches = values[:, values.shape[1] - (case.tokens - case.prefix) :]
        lowest = torch.where(self.mask()[:, case.prefix :] > 0, patches.nan_to_num(nan=-1e30, neginf=-1e30), -torch.inf)
        return torch.cat([values[:, : values.shape[1] - lowest.shape[1]], lowest.to(values.dtype)], 1)

    def probabilities(self) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.case.seed + 6)
        first, second = torch.rand(2, self.case.tokens, generator=random).to(self.case.wide)
        return first, second

    def kept(self) -> tuple[Tensor, Tensor]:
        first, second = torch.tensor([self.kept_p, self.kept_m], dtype=self.case.wide)
        return first, second

    def inputs(self, device: torch.device) -> list[Any]:
        tensors = [self.case.x(), self.mask(), self.importance(), self.case.size(), *self.probabilities(), *self.kept()]
        return [None if tensor is None else tensor.to(device) for tensor in tensors]

    @property
    def options(self) -> dict[str, Any]:
        return {"prefix": self.case.prefix, "sizes": self.sizes}

    def order(self) -> Tensor:
        importance = self.importance().to(self.case.wide)
        return sorted_positions(
            importance[:, importance.shape[1] - (self.case.tokens - self.case.prefix) :], self.case.prefix
        )

    def numbers(self, order: Tensor) -> tuple[int, int, int]:
        """Tokens alive before, after pruning, and after merging."""
        last = int(self.mask()[0].sum()) if self.case.images else self.case.tokens
        middle = min(last, self.kept_p)
        return last, middle, min(middle, self.kept_m)


@st.composite
def calls(draw: st.DrawFn, features: tuple[str, ...] = FEATURES) -> Call:
    case = draw(token_cases(features=features, least_tokens=1))
    least, most = case.prefix + 1, case.tokens + 3  # more than there are: nothing to do
    kept_m = draw(st.sampled_from([least, draw(st.integers(least, max(least, most)))]))
    kept_p = draw(st.sampled_from([case.prefix, kept_m, draw(st.integers(case.prefix, max(least, most))), most]))
    return Call(case, draw(st.sampled_from(ALIVE)), kept_p, kept_m, draw(st.sampled_from(["cosine", "sum"])))


def given_choices(call: Call, order: Tensor, dst: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """x, mask and size, given the order and the matching: plain sums over whole rows, differentiable."""
    last, middle, left = call.numbers(order)
    position = torch.arange(call.case.tokens)

    def compute(
        x: Tensor, mask: Tensor, size: Tensor, prune_prob: Tensor, merge_prob: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, mask, size = reference.gather_tokens(x, order), mask.gather(1, order), size.gather(1, order)
        for first, end, probability in ((call.kept_p, last, prune_prob), (call.kept_m, middle, merge_prob)):
            if first < end:
                hard = ((position < first) | (position >= end)).to(mask.dtype)
                mask = mask * (hard + (probability - probability.detach()))
        if left < middle:
            unit = torch.nn.functional.normalize(x.detach().to(dtype), dim=-1)
            cosine = (unit * reference.gather_tokens(unit, dst)).sum(-1)
            source = (position >= left) & (position < middle)
            gained = torch.where(source, size * cosine, size) if call.sizes == "cosine" else size
            gained = torch.where(position < middle, gained.clamp_min(1), gained)
            size = gained.scatter_add(1, dst[:, left:middle], gained[:, left:middle])
            x = torch.where((position < left)[:, None], reference.merge_reduce(x, dst, call.case.tokens), x)
        return x, mask, size

    return compute


def plain_size(call: Call) -> Tensor:
    size = call.case.size()
    return torch.ones(call.case.images, call.case.tokens, dtype=call.case.wide) if size is None else size


@given(call=calls())
def test_results(device: torch.device, call: Call) -> None:
    case = call.case
    out, out_mask, out_size, order, dst = (
        tensor.cpu() for tensor in ops.masked_prune_merge(*call.inputs(device), **call.options)
    )
    for tensor in (out, out_mask, out_size, order, dst):
        assert tensor.is_contiguous()
    assert_same("order", order, call.order())
    _, middle, left = call.numbers(order)
    position = torch.arange(case.tokens).expand_as(order)
    sorted_x = reference.gather_tokens(case.x(), order)
    assert_same("what no merging moves", dst[:, :left], position[:, :left])
    assert_same("what was masked before", dst[:, middle:], position[:, middle:])
    check_matches(case, sorted_x, dst[:, left:middle], left)

    merged_into = torch.zeros_like(order).scatter_add(1, dst, torch.ones_like(order)) > 1
    assert_same("x of tokens that nothing merged into", out[~merged_into], sorted_x[~merged_into])
    compute = given_choices(call, order, dst)
    inputs = [case.x(), call.mask(), plain_size(call), *call.probabilities()]
    assert_as_accurate_as_eager("x", out, lambda *args: compute(*args)[0], inputs, dtype=case.dtype)
    assert_same("mask", out_mask, compute(*inputs)[1])

    terms = plain_size(call).double().abs().gather(1, order).clamp_min(1)
    magnitude = terms.scatter_add(1, dst[:, left:middle], terms[:, left:middle])
    assert_as_accurate_as_eager(
        "size", out_size, lambda *args: compute(*args)[2], inputs, dtype=case.wide, per=magnitude
    )


@settings(max_examples=25)
@given(call=calls(features=("normal", "clustered")))
def test_gradients(device: torch.device, call: Call) -> None:
    case = call.case
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
    for number in kept:
        number.requires_grad_()  # as those of compression_rate do; their gradient is in the FLOPs
    out, out_mask, out_size, order, dst = ops.masked_prune_merge(
        leaves[0], leaves[1], importance, size, leaves[2], leaves[3], *kept, **call.options
    )
    assert not out_size.requires_grad
    random = torch.Generator().manual_seed(case.seed + 7)
    grad_mask = torch.randn(case.images, case.tokens, generator=random).to(case.wide)
    grad_x = case.gradient(case.tokens)
    torch.autograd.backward([out, out_mask], [grad_x.to(device), grad_mask.to(device)])
    for number in kept:
        assert number.grad is None

    compute = given_choices(call, order.cpu(), dst.cpu())
    inputs = [case.x(), call.mask(), plain_size(call), *call.probabilities(), grad_x, grad_mask]
    for index, (name, leaf) in enumerate(zip(("x", "mask", "prune_prob", "merge_prob"), leaves, strict=True)):

        def gradient(*args: Tensor, index: int = index) -> Tensor:
            x, mask, size, prune_prob, merge_prob, grad_x, grad_mask = args
            leaves = [tensor.detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
            out, out_mask, _ = compute(leaves[0], leaves[1], size, *leaves[2:])
            grads = torch.autograd.grad([out, out_mask], leaves, [grad_x, grad_mask], allow_unused=True)
            found = grads[index]
            return torch.zeros_like(leaves[index]) if found is None else found

        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        terms = None if leaf.ndim > 1 else grad_mask.double().abs().sum(0)  # over the images, with either sign
        assert_as_accurate_as_eager(f"gradient of {name}", grad, gradient, inputs, dtype=leaf.dtype, terms=terms)


@pytest.mark.parametrize("sizes", ["cosine", "sum"])
@pytest.mark.parametrize(
    ("alive", "kept_p", "kept_m"),
    [
        ("all", 150, 90),
        ("all", 197, 90),
        ("all", 90, 150),
        ("all", 300, 300),
        ("some", 110, 90),
        ("some", 150, 90),
        ("some", 90, 150),
        ("some", 150, 150),
        ("anywhere", 110, 90),
    ],
)
def test_the_reference_agrees(device: torch.device, alive: str, kept_p: int, kept_m: int, sizes: str) -> None:
    """Everything at once, gradients too, where no two cosines are near each other: float64 throughout."""
    case = TokenCase(3, 197, 48, 1, torch.float64, sizes="random", seed=kept_p)
    call = Call(case, alive, kept_p, kept_m, sizes)
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    grad_x, grad_mask = case.gradient(197).to(device), torch.randn(3, 197, dtype=torch.float64, device=device)
    found = []
    for function in (ops.masked_prune_merge, reference.masked_prune_merge):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
        results = function(leaves[0], leaves[1], importance, size, leaves[2], leaves[3], *kept, **call.options)
        gradients = torch.autograd.grad(results[:2], leaves, [grad_x, grad_mask], allow_unused=True)
        found.append(
            [*results, *(torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients, strict=True))]
        )
    for name, a, b in zip(("x", "mask", "size", "order", "dst", *("gradient",) * 4), *found, strict=True):
        torch.testing.assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}")


def test_each_branch_gives_its_gradient_alone(device: torch.device) -> None:
    """A rate that removes nothing here has no say in the mask, and gets no gradient."""
    for kept_p, kept_m, prunes, merges in ((9, 6, 1, 1), (9, 9, 1, 0), (17, 6, 0, 1), (17, 17, 0, 0), (12, 20, 1, 0)):
        call = Call(TokenCase(2, 17, 4, 1, torch.float32), "all", kept_p, kept_m, "cosine")
        x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
        prune_prob.requires_grad_()
        merge_prob.requires_grad_()
        result = ops.masked_prune_merge(x, mask, importance, size, prune_prob, merge_prob, *kept)[1]
        result.sum().backward()
        # two images, and all that is not masked by the other
        of_pruning, of_merging = torch.full((17,), 2.0), torch.full((17,), 2.0)
        if merges:
            of_pruning[kept_m : min(kept_p, 17)] = 0
        if prunes:
            of_merging[kept_p:] = 0
        for name, leaf, present, gradient in (
            ("prune_prob", prune_prob, prunes, of_pruning),
            ("merge_prob", merge_prob, merges, of_merging),
        ):
            grad = torch.zeros(17) if leaf.grad is None else leaf.grad
            assert_same(f"gradient of {name} at {kept_p}, {kept_m}", grad, gradient * present)


def test_gradcheck(device: torch.device) -> None:
    """Of x and the mask. The probabilities' values are not used: see the test above for their gradients."""
    call = Call(TokenCase(2, 9, 3, 1, torch.float64, sizes="random"), "all", 7, 4, "cosine")
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    mask = mask * 0.999  # so that neither direction changes the number of tokens that are alive

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out, out_mask, *_ = ops.masked_prune_merge(x, mask, importance, size, prune_prob, merge_prob, *kept)
        return out, out_mask

    assert torch.autograd.gradcheck(function, [x.requires_grad_(), mask.requires_grad_()])


def test_a_second_backward_is_right_or_raises(device: torch.device) -> None:
    call = Call(TokenCase(2, 9, 3, 1, torch.float64, sizes="random"), "all", 7, 4, "cosine")
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    found = []
    for function in (reference.masked_prune_merge, ops.masked_prune_merge):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
        out, out_mask, *_ = function(leaves[0], leaves[1], importance, size, leaves[2], leaves[3], *kept)
        loss = out.square().sum() + out_mask.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        try:
            second = torch.autograd.grad(total, leaves)
        except RuntimeError:
            assert function is ops.masked_prune_merge
            return
        found.append(second)
    for a, b in zip(*found, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(b, a)


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
    plain = ops.masked_prune_merge(x, mask, importance, size, prob, prob, *kept, sizes="sum")[2]
    assert plain.tolist() == [[1.0, 4, 3, 3, 1, 1]]


def test_opposite_tokens_count_as_one(device: torch.device) -> None:
    """Negative cosines would make sizes negative: in the search step, unlike at inference, no size is less than 1."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], device=device)
    importance, size = torch.tensor([[2.0, 1.0]], device=device), torch.tensor([[0.5, 0.25, 3.0]], device=device)
    ones = torch.ones(1, 3, device=device)
    kept = [torch.tensor(3.0, device=device), torch.tensor(2.0, device=device)]
    result = ops.masked_prune_merge(x, ones, importance, size, ones[0], ones[0], *kept)
    assert result[2].tolist() == [[1.0, 2.0, 1.0]]
    result = ops.masked_prune_merge(x, ones, importance, size, ones[0], ones[0], *kept, sizes="sum")
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
    kept, kept_size, slot = ops.prune_merge(x, importance, k_p, k_m, given, prefix=prefix, sizes="sum")
    torch.testing.assert_close(out[:, :k_m], kept)
    torch.testing.assert_close(size[:, :k_m], kept_size)  # sizes of 1 and more, so that the clamp changes none
    assert_same("mask", mask, (torch.arange(65) < k_m).double().expand(2, -1))
    moved = torch.empty_like(dst).scatter_(1, order, torch.where(torch.arange(65, device=device) < k_p, dst, -1))
    assert_same("slot", moved, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vit_layer(device: torch.device, dtype: torch.dtype) -> None:
    """DeiT-S at full size, where the kernels' blocks and vectors are full."""
    case = TokenCase(2, 197, 384, 1, dtype, features="clustered", sizes="random")
    call = Call(case, "some", 120, 100, "cosine")
    out, mask, _, order, dst = (t.cpu() for t in ops.masked_prune_merge(*call.inputs(device)))
    assert_same("order", order, call.order())
    check_matches(case, reference.gather_tokens(case.x(), order), dst[:, 100:120], 100)
    assert_same("mask", mask, (torch.arange(197) < 100).to(mask.dtype).expand(2, -1))
    inputs = [case.x(), call.mask(), plain_size(call), *call.probabilities()]
    compute = given_choices(call, order, dst)
    assert_as_accurate_as_eager("x", out, lambda *args: compute(*args)[0], inputs, dtype=dtype)


# --- special values


def test_constants(device: torch.device) -> None:
    call = Call(TokenCase(2, 9, 3, 1, torch.float32, sizes="random"), "all", 7, 4, "cosine")
    inputs = [tensor.requires_grad_() for tensor in call.inputs(device)]
    out, out_mask, out_size, _, _ = ops.masked_prune_merge(*inputs)
    assert not out_size.requires_grad
    (out.square().sum() + out_mask.sum()).backward()
    has_gradient = [tensor.grad is not None for tensor in inputs]
    assert has_gradient == [True, True, False, False, True, True, False, False]


def test_values_of_the_probabilities_are_not_used(device: torch.device) -> None:
    call = Call(TokenCase(2, 17, 4, 1, torch.float32), "some", 9, 6, "cosine")
    inputs = call.inputs(device)
    expected = ops.masked_prune_merge(*inputs)
    inputs[4] = torch.full_like(inputs[4], -3.0)
    inputs[5] = torch.full_like(inputs[5], 1e6)
    for a, b in zip(ops.masked_prune_merge(*inputs), expected, strict=True):
        assert_same("result", a, b)


@pytest.mark.parametrize("most", [10.0, 1e9, 1e30, torch.inf])
def test_numbers_above_all_tokens_keep_all(device: torch.device, most: float) -> None:
    call = Call(TokenCase(2, 9, 3, 1, torch.float32), "all", 9, 9, "cosine")
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
    call = Call(replace(TokenCase(2, 17, 4, 1, torch.float32, sizes="ones"), dtype=dtype), "some", 9, 6, "cosine")
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
        ({"x": 3.0}, TypeError, "x must be a tensor (B, N, C), got float"),
        ({"x": X[0]}, ValueError, "x must be (B, N, C), got shape (6, 3)"),
        ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
        ({"mask": None}, TypeError, "mask must be a tensor (B, N), got NoneType"),
        ({"mask": ONES[:, :5]}, ValueError, "mask must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"mask": ONES[0]}, ValueError, "mask must be (B, N), got shape (6,)"),
        ({"mask": ONES.bool()}, TypeError, "mask must be float32"),
        ({"mask": ONES.to("meta")}, ValueError, "mask is on meta and x on cpu"),
        ({"mask": ONES * 3}, ValueError, "mask must lie in 0 .. 1, but its first row adds up to 18"),
        ({"mask": ONES * torch.nan}, ValueError, "mask must lie in 0 .. 1, but its first row adds up to nan"),
        ({"importance": None}, TypeError, "importance must be a tensor (B, N-P) or (B, N), got NoneType"),
        ({"importance": torch.zeros(2, 4)}, ValueError, "(B, N-P) = (2, 5) or (B, N) = (2, 6), got shape (2, 4)"),
        ({"importance": torch.zeros(2, 5).int()}, TypeError, "importance must be float32"),
        ({"importance": torch.zeros(2, 5, device="meta")}, ValueError, "importance is on meta and x on cpu"),
        ({"size": ONES[:, :5]}, ValueError, "size must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"size": ONES.long()}, TypeError, "size must be float32"),
        ({"prune_prob": ONES}, ValueError, "prune_prob must be (N,), got shape (2, 6)"),
        ({"prune_prob": ONES[0, :5]}, ValueError, "prune_prob must be (N,) = (6,), got shape (5,)"),
        ({"merge_prob": None}, TypeError, "merge_prob must be a tensor (N,), got NoneType"),
        ({"merge_prob": ONES[0].to("meta")}, ValueError, "merge_prob is on meta and x on cpu"),
        ({"kept_p": 5.0}, TypeError, "kept_p must be a tensor 0-d, got float"),
        ({"kept_p": ONES[0, :1]}, ValueError, "kept_p must be 0-d, got shape (1,)"),
        ({"kept_m": torch.tensor(3)}, TypeError, "kept_m must be float32"),
        (
            {"kept_m": torch.tensor(1.0)},
            ValueError,
            "kept_m must be at least 2 (the prefix and one token to merge into)",
        ),
        ({"kept_m": torch.tensor(-1.0)}, ValueError, "kept_m must be at least 2"),
        ({"kept_m": torch.tensor(torch.nan)}, ValueError, "kept_m must be at least 2"),
        ({"kept_p": torch.tensor(0.0)}, ValueError, "kept_p must be at least the prefix, 1, got 0"),
        ({"kept_p": torch.tensor(torch.nan)}, ValueError, "kept_p must be at least the prefix, 1, got nan"),
        ({"prefix": 7}, ValueError, "prefix must be at most the number of tokens, 6, got 7"),
        ({"prefix": -1}, ValueError, "prefix must be at least 0, got -1"),
        ({"sizes": "max"}, ValueError, "sizes must be one of 'cosine', 'sum', got 'max'"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.masked_prune_merge(**{**GOOD, **changes})


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
