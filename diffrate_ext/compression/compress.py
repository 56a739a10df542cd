"""Compress a model in place, undo it, and follow its tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputTypeError, InputValueError
from ..methods import Method, MethodPlan, method_of
from ..models import adapter_for
from ..modes import evaluating
from ..schedule import Schedule, same_model
from .choice import schedule_for
from .patching import compressed_modules, install_plans, remove_plans

Model = TypeVar("Model", bound=nn.Module)

log = logging.getLogger("diffrate_ext")


def compress(
    model: Model,
    schedule: Schedule | None = None,
    *,
    gflops: float | str | None = None,
    method: str | Method | None = None,
    linear_patch_embedding: bool = True,
) -> Model:
    """Make a model prune and merge tokens between attention and MLP of its blocks.

    The model changes in place: parameters, state_dict and ``isinstance`` stay as they are, attention stays fused. On a
    model that is compressed already the schedule and the method are replaced. For images of another size than the
    model's own, the kept numbers scale with the number of patches. torch.compile, export, DistributedDataParallel,
    ``fully_shard`` and accelerate's hooks come after.

    Args:
        model: a supported model (docs/models.md).
        schedule: the tokens that each block keeps. If it says that it was made for another model, the logger
            ``diffrate_ext`` warns.
        gflops: in place of a schedule, what the model is to cost: multiply-accumulates of one image in units of 1e9, or
            a share of the uncompressed model's, such as ``"60%"``. Takes what :func:`schedule_for` chooses, a published
            schedule or a uniform one; the logger ``diffrate_ext`` says which, at level INFO.
        method: how a block comes down to them; None: as the schedule says. ``"diffrate"`` (section 3 of the paper)
            prunes the least important tokens and merges the next ones; the others remove tokens in one way, and go by
            those left after the block alone: ``"tome"`` merges the tokens with the most similar keys, ``"evit"`` keeps
            those with the most class attention and fuses the rest into one more, ``"random"`` prunes any. Options
            follow a colon: ``"diffrate:operations=merge"``, ``"tome:proportional_attention=false"``. Or a ``Method``,
            such as ``diffrate_ext.methods.ToMe(proportional_attention=False)``. DynamicViT needs an option,
            ``"dynamicvit:predictors=FILE"`` or ``diffrate_ext.methods.DynamicViT(predictors)``: what
            :func:`diffrate_ext.train_predictors` returned.
        linear_patch_embedding: compute a patch embedding whose kernels do not overlap as a matrix product, with the
            same weights. Equal to rounding, and much faster than cuDNN's convolution.

    Returns:
        the model itself.

    Raises:
        InputTypeError: the model's family is not supported, or there are a schedule and GFLOPs, or neither.
        InputValueError: a part of the model is not supported, the schedule does not fit it or the method, or the GFLOPs
            cannot be reached.
    """
    if (schedule is None) == (gflops is None):
        raise InputTypeError("compress takes either a schedule or gflops, such as gflops=2.9 or gflops='60%'")
    if gflops is not None:
        chosen = schedule_for(model, gflops, "diffrate" if method is None else method)
        log.info("compressing by the %s schedule", chosen.name)
        schedule = chosen.schedule
    if not isinstance(schedule, Schedule):
        hint = ": read a file with Schedule.load(path)" if isinstance(schedule, (str, Path)) else ""
        raise InputTypeError(f"schedule must be a Schedule, got {type(schedule).__name__}{hint}")
    if not isinstance(linear_patch_embedding, bool):
        raise InputTypeError(f"linear_patch_embedding must be a bool, got {type(linear_patch_embedding).__name__}")
    method, adapter = method_of(schedule.method if method is None else method), adapter_for(model)
    numbers = adapter.kept_numbers(schedule)
    if not same_model(schedule.model, adapter.name):
        log.warning("%s", _made_for_another(schedule, adapter.name))
    method.check(adapter, numbers)
    parts = zip(adapter.stages, numbers, strict=True)
    plans = [MethodPlan(method, adapter.rules, stage.tokens, kept, stage.fewest) for stage, kept in parts]
    install_plans(adapter, plans, linear_patch_embedding=linear_patch_embedding)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`compress` and :class:`RateSearch`: the model is again what it was.

    Returns:
        the model itself.

    Raises:
        InputValueError: the model is not compressed.
    """
    remove_plans(model)
    return model


def token_slots(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a compressed model once, in evaluation mode, and say where every token went.

    Args:
        model: a compressed model. Its modules stay in their own modes.
        images: (B, channels, height, width), as the model takes them.

    Returns:
        for each block (B, N) int64: the position after that block, among the tokens that are left, of each of the N
        tokens that entered the first block; -1 once pruned. Tokens with the same position were merged. In a
        hierarchical model (CAFormer), the first block of the same stage.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: the model is not compressed.
    """
    compressed_modules(model)
    slots: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        adapter_for(model).observe(images, lambda _, slot: slots.append(slot))
    return slots


def check_made_for(model: nn.Module, schedule: Schedule) -> None:
    """Raise InputValueError when a schedule says that it was made for another model, or for other weights of it."""
    name = adapter_for(model).name
    if not same_model(schedule.model, name):
        raise InputValueError(
            f"{_made_for_another(schedule, name)} (use it all the same with --any-model (any_model=True))"
        )


def _made_for_another(schedule: Schedule, name: str | None) -> str:
    return f"the schedule was made for {schedule.model}, and the model is {name}: what it removes may matter here"
