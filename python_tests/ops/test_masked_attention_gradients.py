"""Gradients of masked_attention against those of the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given, settings
from masked_attention_calls import Magnitudes, calls, reference_of
from strategies import DTYPES, AttentionCase, wide
from torch import Tensor

from diffrate_ext import ops

NAMES = ("q", "k", "v", "mask")


@settings(max_examples=25)
@given(call=calls(most_tokens=257), mask_gradient=st.sampled_from(["derivative", "difference"]))
def test_gradients(device: torch.device, call: tuple[AttentionCase, str, str], mask_gradient: Any) -> None:
    check_gradients(device, *call, mask_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_gradient", ["derivative", "difference"])
def test_gradients_at_the_sizes_of_a_model(device: torch.device, dtype: torch.dtype, mask_gradient: Any) -> None:
    case = AttentionCase(1, 2, 577, 64, 1, dtype, "packed qkv", "random")
    check_gradients(device, case, "random", "class", mask_gradient)


def check_gradients(
    device: torch.device, case: AttentionCase, mask_kind: str, importance_from: str, mask_gradient: Any
) -> None:
    q, k, v = case.qkv()
    mask, size, gradient = case.mask(mask_kind), case.size(), case.gradient()
    leaves = [tensor.requires_grad_() for tensor in (*case.qkv(device), case.mask(mask_kind, device))]
    assert [leaf.stride() for leaf in leaves[:3]] == [tensor.stride() for tensor in (q, k, v)]
    out, importance = ops.masked_attention(
        *leaves,
        case.size(device),
        scale=case.scale,
        prefix=case.prefix,
        importance_from=importance_from,
        mask_gradient=mask_gradient,
    )
    assert not importance.requires_grad
    grads = torch.autograd.grad(out, leaves, gradient.to(device))

    compute_all = remembered(gradients_of_reference(case, importance_from, mask_gradient))
    terms = Magnitudes(case, q, k, mask, size).gradients(v, gradient, mask_gradient)
    for index, name in enumerate(NAMES):

        def compute(*inputs: Any, index: int = index) -> Tensor:
            return compute_all(*inputs)[index]

        assert_as_accurate_as_eager(
            f"gradient of {name}",
            grads[index],
            compute,
            [q, k, v, mask, size, gradient],
            dtype=wide(case.dtype) if name == "mask" else case.dtype,
            terms=terms[index],
        )


def gradients_of_reference(
    case: AttentionCase, importance_from: str, mask_gradient: str
) -> Callable[..., tuple[Tensor, ...]]:
    def compute(*inputs: Any) -> tuple[Tensor, ...]:
        *features, size, gradient = inputs
        leaves = [tensor.detach().requires_grad_() for tensor in features]
        out, _ = reference_of(case, importance_from, mask_gradient)(*leaves, size)
        return torch.autograd.grad(out, leaves, gradient)

    return compute


def remembered(compute: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The comparisons of four gradients ask for the same ones, on the same few inputs."""
    known: dict[tuple, tuple[Tensor, ...]] = {}

    def call(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        key = tuple(None if t is None else (t.dtype, t.double().nan_to_num(0, 1, -1).sum().item()) for t in inputs)
        if key not in known:
            known[key] = compute(*inputs)
        return known[key]

    return call


def test_gradcheck(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 3, generator=random, dtype=torch.float64).to(device)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0.3, 0.8, 0, 1]], dtype=torch.float64, device=device)
    size = (1 + torch.rand(2, 5, generator=random)).double().to(device)

    def function(*inputs: Tensor) -> Tensor:
        return ops.masked_attention(*inputs, size)[0]

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in (q, k, v, mask)])


def test_a_difference_is_what_would_change(device: torch.device) -> None:
    """... for all other tokens if a masked one were there, however sharp the attention."""
    case = AttentionCase(2, 2, 17, 8, 1, torch.float64, sizes="random")
    q, k, v = case.qkv(device)
    size, gradient = case.size(device), case.gradient(device)
    mask = (torch.arange(17, device=device) % 3 != 1).double().expand(2, -1).clone().requires_grad_()
    out, _ = ops.masked_attention(q, k, v, mask, size, scale=3.0, mask_gradient="difference")
    (found,) = torch.autograd.grad(out, mask, gradient)
    for token in (1, 4, 7, 16):
        there = mask.detach().clone()
        there[:, token] = 1
        change = gradient * (ops.masked_attention(q, k, v, there, size, scale=3.0)[0] - out.detach())
        change[:, :, token] = 0
        torch.testing.assert_close(found[:, token], change.sum((1, 2, 3)), rtol=1e-3, atol=1e-3)
    (steeper,) = torch.autograd.grad(ops.masked_attention(q, k, v, mask, size, scale=3.0)[0], mask, gradient)
    masked = mask.detach() == 0
    assert (steeper[masked] - found[masked]).abs().max() > 1
    torch.testing.assert_close(steeper[~masked], found[~masked])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_some_gradients_alone(device: torch.device, wanted: tuple[int, ...]) -> None:
    case = AttentionCase(2, 2, 17, 8, 1, torch.float32, sizes="random")
    inputs = [*case.qkv(device), case.mask("random", device)]
    gradient, size = case.gradient(device), case.size(device)
    assert size is not None
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    every = torch.autograd.grad(ops.masked_attention(*leaves, size)[0], leaves, gradient)
    leaves = [tensor.clone().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
    ops.masked_attention(*leaves, size)[0].backward(gradient)
    for index, leaf in enumerate(leaves):
        if index in wanted:
            assert leaf.grad is not None
            assert_same(f"gradient of {NAMES[index]}", leaf.grad, every[index])
        else:
            assert leaf.grad is None


def test_size_is_a_constant(device: torch.device) -> None:
    case = AttentionCase(2, 2, 6, 4, 1, torch.float32)
    q, k, v = (tensor.requires_grad_() for tensor in case.qkv(device))
    size = torch.full((2, 6), 2.0, device=device, requires_grad=True)
    ops.masked_attention(q, k, v, torch.ones(2, 6, device=device), size)[0].sum().backward()
    assert q.grad is not None
    assert size.grad is None


def test_a_second_backward_raises(device: torch.device) -> None:
    """Rather than returning zeros for what it has no formula for."""
    case = AttentionCase(1, 2, 5, 3, 1, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*case.qkv(device), case.mask("fractional", device))]
    out, _ = ops.masked_attention(*leaves)
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    for index in range(4):
        with pytest.raises(RuntimeError):
            torch.autograd.grad(first[index].square().sum(), leaves, retain_graph=True)
