"""Compress a model in place, and undo it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .models import adapter_for
from .models.base import CompressedModule, Plan, compressed_class, original_class
from .models.masked import SearchPlan
from .schedule import Schedule

Model = TypeVar("Model", bound=nn.Module)


def compress(model: Model, schedule: Schedule) -> Model:
    """Make a model prune and merge tokens between attention and MLP of its blocks (paper, sections 3.2 and 3.3).

    The model changes in place: parameters, state_dict and ``isinstance`` stay as they are, attention stays fused. On a
    model that is compressed already the schedule is replaced. For images of another size than the model's own, the
    kept numbers scale with the number of patches. torch.compile, export and DistributedDataParallel come after.

    Args:
        model: one of timm's VisionTransformer or MetaFormer (CAFormer) models.
        schedule: the tokens that each block keeps.

    Returns:
        the model itself.

    Raises:
        TypeError: the model's family is not supported.
        ValueError: a part of the model is not supported, or the schedule does not fit it.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
    adapter = adapter_for(model)
    steps, compressor = adapter.steps(model, schedule), adapter.compressor(model)
    parts = zip(adapter.compressed_parts(model), adapter.stages(model), steps, strict=True)
    for (module, mixin), stage, numbers in parts:
        install_plan(module, mixin, Plan(compressor, stage.tokens, numbers, original_class(module)))
    return model


def restore(model: Model) -> Model:
    """Undo :func:`compress` and :class:`RateSearch`: the model is again what it was.

    Returns:
        the model itself.

    Raises:
        TypeError: the model's family is not supported.
        ValueError: the model is not compressed.
    """
    for module in _compressed_modules(model):
        module._diffrate_plan.release()
        module.__class__ = original_class(module)
        del module._diffrate_plan
    return model


def token_slots(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a compressed model once and say where every token went.

    Args:
        model: a compressed model.
        images: (B, channels, height, width), as the model takes them.

    Returns:
        for each block (B, N) int64: the position after that block, among the tokens that are left, of each of the N
        tokens that entered the first block; -1 once pruned. Tokens with the same position were merged. In a
        hierarchical model (CAFormer), the first block of the same stage.

    Raises:
        ValueError: the model is not compressed, or it is in training mode under a :class:`RateSearch`, where no token
            goes anywhere.
    """
    for module in _compressed_modules(model):
        if module.training and isinstance(module._diffrate_plan, SearchPlan):
            raise ValueError("in the search step tokens are masked and stay where they are: call eval() first")
    slots: list[Tensor] = []
    with torch.no_grad():
        adapter_for(model).run(model, images, lambda _, slot: slots.append(slot))
    return slots


def _compressed_modules(model: nn.Module) -> list[Any]:
    modules = [module for module, _ in adapter_for(model).compressed_parts(model)]
    if not all(isinstance(module, CompressedModule) for module in modules):
        raise ValueError("the model is not compressed: compress(model, schedule) it first")
    return modules


def install_plan(module: Any, mixin: type[CompressedModule], plan: Plan | SearchPlan) -> None:
    """Give a module another forward, in place of what it did before."""
    if isinstance(module, CompressedModule):
        module._diffrate_plan.release()
    module._diffrate_plan = plan
    module.__class__ = compressed_class(mixin, plan.base)  # type: ignore[arg-type]
