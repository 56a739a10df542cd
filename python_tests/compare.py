"""Comparisons that say where two results differ most.

The tolerance of :func:`assert_as_accurate_as_eager` is measured, not chosen: a kernel may be twice as far from a
float64 reference as plain PyTorch in the same dtype is, plus twice what one rounding does to numbers of the result's
magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Compute = Callable[..., Tensor]
# Eager error is measured on so many inputs, until it has been seen in so many values: that it is small for one
# input may be luck.
FEWEST_INPUTS, MOST_INPUTS, ENOUGH_VALUES = 4, 64, 4096


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal values, dtype and shape; NaN equals NaN, and -0 equals +0."""
    _check_kind(name, actual, expected.shape, expected.dtype)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    different = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if different.any():
        index = tuple(int(i) for i in different.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(different.sum())} of {different.numel()} values differ, first at {index}: "
            f"got {actual[index].item()}, expected {expected[index].item()}"
        )


def assert_as_accurate_as_eager(
    name: str,
    actual: Tensor,
    compute: Compute,
    inputs: Sequence[Tensor | None],
    *,
    dtype: torch.dtype,
    per: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    """``actual``, of this dtype, is as near to ``compute`` in float64 as ``compute`` in the inputs' own dtype is.

    Args:
        compute: the operation in plain PyTorch; works in the dtype of its inputs.
        inputs: floating-point tensors, or None.
        terms: magnitudes of what is rounded on the way, where that is more than the result: the terms of a difference.
        per: magnitudes, broadcast against the result, that errors are measured in, where its parts differ in scale.
    """
    inputs = [None if tensor is None else tensor.detach().cpu() for tensor in inputs]
    reference = compute(*_converted(inputs, torch.float64))
    _check_kind(name, actual, reference.shape, dtype)
    units = torch.ones((), dtype=torch.float64) if per is None else per.detach().cpu().double()
    rounded = reference if terms is None else terms.detach().cpu().double()
    bound = 2 * (eager_error(compute, inputs, units) + rounding_noise(rounded / units, dtype))
    assert_within(name, actual.detach().cpu().double() / units, reference / units, bound)


def assert_within(name: str, actual: Tensor, reference: Tensor, bound: float) -> None:
    """No value is further than ``bound`` from its reference; NaN and infinities are where the reference has them."""
    unequal = (actual - reference).abs()
    unequal = torch.where(reference.isfinite(), unequal.nan_to_num(nan=torch.inf), torch.inf)
    unequal = torch.where((actual == reference) | (actual.isnan() & reference.isnan()), 0.0, unequal)
    if unequal.numel() == 0 or (worst := unequal.max().item()) <= bound:
        return
    index = tuple(int(i) for i in torch.unravel_index(unequal.argmax(), unequal.shape))
    raise AssertionError(
        f"{name}: worst at {index}: got {actual[index].item()}, expected {reference[index].item()}, "
        f"off by {worst:.3e}, allowed {bound:.3e}; {int((unequal > bound).sum())} of {unequal.numel()} values are off"
    )


def eager_error(compute: Compute, inputs: Sequence[Tensor | None], units: Tensor) -> float:
    """Largest error of ``compute`` in the inputs' dtype, on these inputs and a few near them.

    For float64, whose reference would be itself: float32's error, scaled by the ratio of their precisions.
    """
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in inputs)
    shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if doubles else 1.0
    own = _converted(inputs, torch.float32) if doubles else list(inputs)
    random = torch.Generator().manual_seed(0)
    largest, seen = 0.0, 0
    for neighbour in range(MOST_INPUTS):
        error = (compute(*own).double() - compute(*_converted(own, torch.float64))).div(units).abs()
        error = error[error.isfinite()]
        largest = max(largest, error.max().item() if error.numel() else 0.0)
        seen += error.numel()
        if neighbour + 1 >= FEWEST_INPUTS and seen >= ENOUGH_VALUES:
            break
        own = [None if tensor is None else _nudged(tensor, random) for tensor in own]
    return largest * shrink


def rounding_noise(reference: Tensor, dtype: torch.dtype) -> float:
    """What adding something of the result's magnitude and taking it off again does to it in this dtype."""
    smallest = min(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny)  # below it, kernels need not count
    finite = reference[reference.isfinite()]
    if finite.numel() == 0:
        return smallest
    rounded, top = finite.to(dtype), finite.abs().max()
    shifts = [(part * top).to(dtype) for part in (0.3, 0.5, 0.7)]
    noise = max((rounded + shift - shift - rounded).double().abs().max().item() for shift in shifts)
    return noise + smallest + torch.finfo(torch.float64).eps * top.item()  # the reference, too, is rounded


def _nudged(tensor: Tensor, random: torch.Generator) -> Tensor:
    factor = 1 + (torch.rand(tensor.shape, generator=random) - 0.5) / 64
    return (tensor * factor.to(tensor.dtype)).to(tensor.dtype)


def _converted(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _check_kind(name: str, actual: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if actual.shape != shape or actual.dtype != dtype:
        raise AssertionError(
            f"{name}: got {actual.dtype} of shape {tuple(actual.shape)}, expected {dtype} of shape {tuple(shape)}"
        )
