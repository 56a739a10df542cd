"""Changing a model's classes in place, and changing them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import InputValueError
from ..models import Adapter
from ..models.classes import CompressedModule, compressed_class, original_class
from ..models.compressed import Plan
from ..models.patch_embedding import TiledConvolution
from ..modes import evaluating


def install_plans(adapter: Adapter, plans: Sequence[Plan], *, linear_patch_embedding: bool = True) -> None:
    """Make the model's stages follow these plans, one for each, in place of what they did before.

    Raises:
        InputValueError: a module has a forward of its own, which compression would bypass.
    """
    replacements = adapter.replacements
    for convolution in adapter.patch_convolutions:
        if linear_patch_embedding:
            replacements.append((convolution, TiledConvolution))
        else:
            convolution.__class__ = original_class(convolution)
    for module, _ in replacements:
        if not isinstance(module, CompressedModule):
            _refuse_own_forward(adapter.model, module, "compress the model first, and add them afterwards")
    for module, mixin in replacements:
        module.__class__ = compressed_class(mixin, original_class(module))  # type: ignore[arg-type]
    for stage, plan in zip(adapter.stages, plans, strict=True):
        host: Any = stage.host
        replaced = host.__dict__.get("_diffrate_plan")
        host._diffrate_plan = plan
        if replaced is not None:
            replaced.release()


def remove_plans(model: nn.Module, *, release: bool = True) -> None:
    """Give all modules their classes back.

    Args:
        release: whether the plans undo what else they changed.
    """
    modules = compressed_modules(model)
    for module in modules:
        _refuse_own_forward(model, module, "remove them first")
    for module in modules:
        module.__class__ = original_class(module)
        plan = module.__dict__.pop("_diffrate_plan", None)
        if plan is not None and release:
            plan.release()


def compressed_modules(model: nn.Module) -> list[Any]:
    """The modules of a model whose class compression changed.

    Raises:
        InputValueError: there are none.
    """
    modules = [module for module in model.modules() if isinstance(module, CompressedModule)]
    if not modules:
        raise InputValueError("the model is not compressed: compress(model, schedule) it first")
    return modules


@contextmanager
def without_plans(model: nn.Module) -> Iterator[nn.Module]:
    """Within a ``with`` block a compressed model is what it was before, in evaluation mode."""
    modules = compressed_modules(model)
    classes = [type(module) for module in modules]
    with evaluating(model):
        for module in modules:
            module.__class__ = original_class(module)
        try:
            yield model
        finally:
            for module, cls in zip(modules, classes, strict=True):
                module.__class__ = cls


def _refuse_own_forward(model: nn.Module, module: nn.Module, remedy: str) -> None:
    own = vars(module).get("forward")
    if own is None:
        return
    if getattr(own, "__func__", None) is type(module).forward:  # what accelerate leaves when its hooks are removed
        del module.forward
        return
    name = next((name for name, part in model.named_modules() if part is module), "") or "the model"
    raise InputValueError(
        f"{name} has a forward of its own, set on the instance (as accelerate's hooks do it): {remedy}"
    )
