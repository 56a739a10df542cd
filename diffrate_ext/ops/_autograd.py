"""The operators' gradients, in plain autograd and in the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modes import in_forward_mode, in_transform

_IN_TRANSFORMS: dict[Any, type[torch.autograd.Function]] = {}
"""By operator: transforms refuse the autograd functions that torch.library makes, so each operator has one for them."""


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
        refuse_tangents(operator.__name__.removesuffix(".default"), *arguments)
    if in_transform():
        return _IN_TRANSFORMS[operator].apply(*arguments)
    return operator(*arguments)


def refuse_tangents(name: str, *arguments: Any) -> None:
    """Raises where one of the arguments has a tangent, which the result would silently lack."""
    _TangentsRefused.apply(name, *arguments)


class _TangentsRefused(torch.autograd.Function):
    """What torch calls where there is a tangent, however many transforms it is wrapped in."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *arguments: Any) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise NotImplementedError(
            f"{ctx.name} has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad): differentiate in reverse "
            "mode (backward, torch.func.grad, vjp, jacrev)"
        )
