"""Calling the compiled operators at little cost to the host, which at batch 1 is what a model waits for.

The operators check what they are given in C++, tersely. So the functions around them call first, and look for the words
of a good error only when that failed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modes import in_forward_mode, in_transform
from ._autograd import with_gradient

REFUSED = (RuntimeError, TypeError, AttributeError)
"""What an operator, or the way to it, raises for a wrong argument."""


def call(operator: Any, arguments: tuple, *differentiable: Tensor | None) -> Any:
    """An operator with a gradient formula, past torch's layer for that (10 us a call, in Python) where none is needed.

    Args:
        operator: one overload, ``torch.ops.diffrate.<name>.default``.
        arguments: all of its arguments.
        differentiable: those that it has a gradient for.
    """
    if torch.compiler.is_compiling() or needs_gradient(*differentiable):
        return with_gradient(operator, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a derivative is wanted by one of the tensors, or may be: a transform's tensors do not tell."""
    if in_forward_mode():  # with or without grad mode
        return True
    if not torch.is_grad_enabled():
        return False
    return in_transform() or any(tensor is not None and tensor.requires_grad for tensor in tensors)
