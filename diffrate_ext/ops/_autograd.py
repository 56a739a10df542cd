"""The operators' gradients, in plain autograd and in the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modes import in_forward_mode, in_transform

_IN_TRANSFORMS: dict[Any, type[torch.autograd.Function]] = {}
"""By operator: transforms refuse the autograd functions that torch.library makes, so each operator has one for them."""

_NO_FORWARD_MODE = (
    "diffrate_ext's operators have no forward-mode derivative (jvp, jacfwd, hessian, forward_ad): differentiate in "
    "reverse mode (backward, torch.func.grad, vjp, jacrev)"
)


def register_gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    """The formula for the gradient of an operator, which is then to be called by :func:`with_gradient`."""
    torch.library.register_autograd(f"diffrate::{name}", backward, setup_context=setup_context)
    operator = getattr(torch.ops.diffrate, name).default

    class InTransforms(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

    InTransforms.__name__ = name
    InTransforms.setup_context = staticmethod(setup_context)  # type: ignore[assignment]
    InTransforms.backward = staticmethod(backward)  # type: ignore[assignment]
    _IN_TRANSFORMS[operator] = InTransforms


def refuse_gradient(name: str, message: str) -> None:
    """Where a formula is missing, a gradient raises, instead of being zero."""

    def refuse(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(message)

    register_gradient(name, refuse, lambda ctx, inputs, output: None)


def with_gradient(operator: Any, *arguments: Any) -> Any:
    """An operator that gradients go through, those of transforms, too.

    Args:
        operator: one overload, ``torch.ops.diffrate.<name>.default``.
        arguments: all of its arguments: transforms add no defaults.
    """
    if in_forward_mode():
        refuse_tangents(*arguments)
    if torch.is_grad_enabled() and in_transform():
        return _IN_TRANSFORMS[operator].apply(*arguments)
    return operator(*arguments)


def refuse_tangents(*arguments: Any) -> None:
    """In forward mode: raises where one of the arguments has a tangent, which the result would silently lack."""
    if torch.compiler.is_compiling():  # a compiler does not see tangents
        raise NotImplementedError(_NO_FORWARD_MODE)
    _TangentsRefused.apply(*arguments)


class _TangentsRefused(torch.autograd.Function):
    """torch calls ``jvp`` where there is a tangent, however many transforms it is wrapped in."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise NotImplementedError(_NO_FORWARD_MODE)
