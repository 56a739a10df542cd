"""FLOPs targets: GFLOPs, or a share of what the uncompressed model takes."""

from __future__ import annotations

from torch import nn

from ..errors import InputValueError
from .flops import flops


def gflops_of(model: nn.Module, target: float | str) -> float:
    """A target in units of 1e9 multiply-accumulates: a number as it is, "60%" as a share of the uncompressed model's.

    Raises:
        InputValueError: a text of another kind.
    """
    return _share_in(target) * flops(model) / 1e9 if isinstance(target, str) else float(target)


def _share_in(text: str) -> float:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
    except ValueError:
        pass
    raise InputValueError(f"gflops must be a number, or a share of the model's such as '60%', got {text!r}")
