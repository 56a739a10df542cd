"""FLOPs targets: GFLOPs, or a share of what the uncompressed model takes."""

from __future__ import annotations

import math
from numbers import Real

from torch import nn

from ..errors import InputTypeError, InputValueError
from .flops import flops


def gflops_of(model: nn.Module, target: float | str) -> float:
    """A target in units of 1e9 multiply-accumulates: a number as it is, "60%" as a share of the uncompressed model's.

    Raises:
        InputTypeError: neither a number nor a text.
        InputValueError: a text of another kind, or a number that is not positive and finite.
    """
    if isinstance(target, str):
        found = share_in(target) * flops(model) / 1e9
    elif isinstance(target, Real) and not isinstance(target, bool):
        found = float(target)
    else:
        raise InputTypeError(f"gflops must be a number, or a share such as '60%', got {type(target).__name__}")
    if not 0 < found < math.inf:
        raise InputValueError(f"gflops must be positive and finite, got {target}")
    return found


def share_meant(gflops: float, uncompressed: float) -> str:
    """For a target that is out of reach: how it is written, if it looks like per cents without their sign."""
    return f". As a share, write '{gflops:g}%'" if uncompressed < gflops and 1 < gflops <= 100 else ""


def share_in(text: str) -> float:
    """What "60%" says, 0.6."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
    except ValueError:
        pass
    raise InputValueError(f"a target must be a number, or a share of the model's such as '60%', got {text!r}")
