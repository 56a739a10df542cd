"""Gradients of masked_prune_merge, given the kernel's own choices and against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from called_operators import CalledOperators
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given, settings
from masked_prune_merge_calls import Call, calls, given_choices
from strategies import TokenCase
from torch import Tensor

from diffrate_ext import ops, reference

NAMES = ("x", "mask", "prune_prob", "merge_prob")


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
    inputs = [case.x(), call.mask(), call.case.plain_size(), *call.probabilities(), grad_x, grad_mask]
    for index, (name, leaf) in enumerate(zip(NAMES, leaves, strict=True)):

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


@pytest.mark.parametrize("size_rule", ["cosine", "sum"])
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
def test_the_reference_agrees(device: torch.device, alive: str, kept_p: int, kept_m: int, size_rule: str) -> None:
    case = TokenCase(3, 197, 48, 1, torch.float64, sizes="random", seed=kept_p)
    check_against_reference(device, Call(case, alive, kept_p, kept_m, size_rule))


@pytest.mark.parametrize("alive", ["all", "some"])  # 17 and 12 of them
@pytest.mark.parametrize(
    ("kept_p", "kept_m"),
    [
        (12.4, 6.5),
        (12.5, 6.4),
        (12.6, 6.6),
        (11.4, 6.5),
        (11.5, 6.5),
        (11.6, 7.5),
        (16.4, 6.5),
        (16.6, 6.5),
        (17.0, 16.5),
        (17.0, 11.5),
        (12.5, 12.4),
        (12.6, 12.5),
        (6.5, 12.4),
        (6.5, 6.4),
        (6.6, 6.5),
        (1.4, 2.0),
    ],
)
def test_the_reference_agrees_on_unrounded_numbers(
    device: torch.device, alive: str, kept_p: float, kept_m: float
) -> None:
    """Forward and backward round them by one rule: to the nearest whole number, halves up."""
    case = TokenCase(3, 17, 8, 1, torch.float64, sizes="random")
    check_against_reference(device, Call(case, alive, kept_p, kept_m))


def check_against_reference(device: torch.device, call: Call) -> None:
    """Everything at once, gradients too, where no two cosines are near each other: float64 throughout."""
    case = call.case
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    grad_x = case.gradient(case.tokens, device)
    grad_mask = torch.randn(case.images, case.tokens, dtype=torch.float64, device=device)
    found = []
    for function in (ops.masked_prune_merge, reference.masked_prune_merge):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
        results = function(leaves[0], leaves[1], importance, size, leaves[2], leaves[3], *kept, **call.options)
        gradients = torch.autograd.grad(results[:2], leaves, [grad_x, grad_mask], allow_unused=True)
        found.append(
            [*results, *(torch.zeros_like(a) if g is None else g for a, g in zip(leaves, gradients, strict=True))]
        )
    names = (*ops.MaskedTokens._fields, *(f"gradient of {name}" for name in NAMES))
    for name, a, b in zip(names, *found, strict=True):
        torch.testing.assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}")


def test_each_branch_gives_its_gradient_alone(device: torch.device) -> None:
    """A rate that removes nothing here has no say in the mask, and gets no gradient."""
    for kept_p, kept_m, prunes, merges in ((9, 6, 1, 1), (9, 9, 1, 0), (17, 6, 0, 1), (17, 17, 0, 0), (12, 20, 1, 0)):
        call = Call(TokenCase(2, 17, 4, 1, torch.float32), "all", kept_p, kept_m)
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
    call = Call(TokenCase(2, 9, 3, 1, torch.float64, sizes="random"), "all", 7, 4)
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    mask = mask * 0.999  # so that neither direction changes the number of tokens that are alive

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out, out_mask, *_ = ops.masked_prune_merge(x, mask, importance, size, prune_prob, merge_prob, *kept)
        return out, out_mask

    assert torch.autograd.gradcheck(function, [x.requires_grad_(), mask.requires_grad_()])


def test_a_second_backward_raises(device: torch.device) -> None:
    """Rather than returning zeros for what it has no formula for."""
    call = Call(TokenCase(2, 9, 3, 1, torch.float64, sizes="random"), "all", 7, 4)
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, mask, prune_prob, merge_prob)]
    out, out_mask, *_ = ops.masked_prune_merge(leaves[0], leaves[1], importance, size, leaves[2], leaves[3], *kept)
    loss = out.square().sum() + out_mask.square().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match="masked_prune_merge cannot be differentiated twice"):
            torch.autograd.grad(gradient.square().sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("arriving", [(0, 1), (0,), (1,)], ids=["of both", "of x", "of the mask"])
@pytest.mark.parametrize("needed", [("x",), ("mask",), ("prune_prob",), ("x", "merge_prob"), NAMES], ids=" ".join)
def test_what_nobody_needs_is_not_computed(
    device: torch.device, needed: tuple[str, ...], arriving: tuple[int, ...]
) -> None:
    call = Call(TokenCase(2, 17, 4, 1, torch.float32), "some", 9, 6)
    x, mask, importance, size, prune_prob, merge_prob, *kept = call.inputs(device)
    arrives = call.case.gradient(17, device), torch.linspace(-1, 1, 34, device=device).view(2, 17)

    def gradients(names: tuple[str, ...]) -> list[Tensor | None]:
        leaves = [
            tensor.detach().requires_grad_(name in names)
            for name, tensor in zip(NAMES, (x, mask, prune_prob, merge_prob), strict=True)
        ]
        results = ops.masked_prune_merge(leaves[0], leaves[1], importance, size, leaves[2], leaves[3], *kept)
        torch.autograd.backward([results[index] for index in arriving], [arrives[index] for index in arriving])
        return [leaf.grad for leaf in leaves]

    with CalledOperators() as called:
        found = gradients(needed)
    for name, actual, expected in zip(NAMES, found, gradients(NAMES), strict=True):
        if name not in needed or expected is None:
            assert actual is None
        else:
            assert actual is not None
            assert_same(f"gradient of {name}", actual, expected)
    of_x, of_mask = "x" in needed and 0 in arriving, needed != ("x",) and 1 in arriving
    computed = [
        tuple(gradient is not None for gradient in arguments[:2])
        for name, arguments in zip(called.names, called.arguments, strict=True)
        if name == "masked_prune_merge_backward"
    ]
    assert computed == ([(of_x, of_mask)] if of_x or of_mask else [])


ONES = torch.ones(2, 6)
POSITION = torch.arange(6).expand(2, -1)
GOOD: dict[str, Any] = {
    "grad_out": torch.zeros(2, 6, 3),
    "grad_out_mask": ONES,
    "mask": ONES,
    "order": POSITION,
    "dst": POSITION,
    "kept_p": torch.tensor(5.0),
    "kept_m": torch.tensor(3.0),
    "prefix": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_out": ONES},
        {"grad_out": torch.zeros(1, 6, 3)},
        {"grad_out": torch.zeros(2, 5, 3)},
        {"grad_out": torch.zeros(2, 6, 3).double()},
        {"grad_out": torch.zeros(2, 6, 3).long()},
        {"grad_out_mask": ONES[:, :5]},
        {"grad_out_mask": ONES.double()},
        {"mask": ONES[0]},
        {"mask": ONES[:, :5]},
        {"mask": ONES.half()},
        {"mask": ONES.half(), "grad_out": None, "grad_out_mask": ONES},
        {"order": POSITION[:1]},
        {"order": POSITION[:, :5]},
        {"order": POSITION.int()},
        {"dst": POSITION[:1]},
        {"dst": POSITION[:, :5]},
        {"dst": POSITION.int()},
        {"kept_p": ONES[0, :1]},
        {"kept_m": torch.tensor(5.0).double()},
        {"prefix": -1},
        {"prefix": 7, "grad_out": None},
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any]) -> None:
    torch.ops.diffrate.masked_prune_merge_backward(**GOOD)
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.masked_prune_merge_backward(**{**GOOD, **changes})


def test_positions_that_make_no_sense(device: torch.device) -> None:
    """They stay in bounds: each counts as the token's own position."""
    good = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in GOOD.items()}
    good["grad_out"] = torch.randn(2, 6, 3, device=device)
    bad = {name: torch.full((2, 6), value, device=device) for name, value in (("order", -(2**40)), ("dst", 6))}
    operator = torch.ops.diffrate.masked_prune_merge_backward
    for actual, expected in zip(operator(**{**good, **bad}), operator(**good), strict=True):
        assert_same("gradient", actual, expected)
