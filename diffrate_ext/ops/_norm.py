"""The layer normalization that an operator may be given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..errors import InputTypeError
from ._checks import check_eps, check_like, check_shape, check_tensor


class Norm(NamedTuple):
    """Layer normalization over the channels, as ``torch.nn.LayerNorm`` has it."""

    weight: Tensor
    """(C), of the features' dtype."""
    bias: Tensor | None = None
    """The same; None: zeros."""
    eps: float = 1e-5


def check_norm(norm: object, x: Tensor) -> None:
    if not isinstance(norm, Norm):
        raise InputTypeError(f"norm must be a Norm(weight, bias, eps), got {type(norm).__name__}")
    for name, value in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if value is None and name == "norm.bias":
            continue
        tensor = check_tensor(name, value, 1, "(C,)")
        check_shape(name, tensor, (x.shape[2],), "(C,)")
        check_like(name, tensor, "x", x)
    check_eps("norm.eps", norm.eps)


def is_plain(norm: Norm) -> bool:
    """Whether an operator takes its parts as they are, and checks them as :func:`check_norm` does."""
    return type(norm) is Norm and norm.weight is not None and type(norm.eps) is float
