"""Holding the rates at a FLOPs target: gradients that do not lead off it, and the way back to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEEPEST = 1e8
"""The largest tilt that is tried: every distribution has long been at its end."""


def along_target(gradients: Sequence[Tensor], slopes: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    """Gradients of a loss, freed from what a tilt of all rates would do: it is taken back after the step.

    What is added is the slope of the FLOPs, times their price: by how much the loss falls for each FLOP that a tilt
    buys. Where no exchange of FLOPs between blocks lowers the loss, nothing is left. Without this, Adam would see that
    every block wants more tokens, move all alike, and learn nothing of where they are worth most.

    Args:
        gradients: of the loss with respect to the logits of proxies (proxies, candidates).
        slopes: the same of the FLOPs.
        direction: what a tilt adds to logits (candidates).
    """
    gain = torch.stack([(gradient * direction).sum() for gradient in gradients]).sum()
    cost = torch.stack([(slope * direction).sum() for slope in slopes]).sum()
    price = gain / cost.clamp_min(torch.finfo(cost.dtype).tiny)  # 0 where no distribution has any width left
    return [gradient - price * slope for gradient, slope in zip(gradients, slopes, strict=True)]


def nearest_tilt(error: Callable[[float], float], enough: float) -> float:
    """The tilt of the smallest error among those that a bisection tries, up to the first one that is small enough.

    Args:
        error: of a tilt; rises with it, in steps.
        enough: an error that is small enough.
    """
    errors = {0.0: error(0.0)}
    too_much = errors[0.0] > 0
    inner, outer = 0.0, -1.0 if too_much else 1.0

    def is_short(tilt: float) -> bool:
        """Whether a tilt does not reach to the other side."""
        errors[tilt] = error(tilt)
        return (errors[tilt] > 0) == too_much

    def done() -> bool:
        return min(map(abs, errors.values())) <= enough

    while not done() and abs(outer) < STEEPEST and is_short(outer):
        inner, outer = outer, 2 * outer
    for _ in range(40):
        if done():
            break
        middle = (inner + outer) / 2
        if is_short(middle):
            inner = middle
        else:
            outer = middle
    return min(errors, key=lambda tilt: abs(errors[tilt]))
