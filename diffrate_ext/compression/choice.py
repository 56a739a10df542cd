"""The schedule to use where only the FLOPs are given: a published one for these weights, or else a uniform one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..answers import number_of_classes
from ..methods import Method, method_of
from ..models import adapter_for
from ..schedule import Schedule
from .flops import flops
from .targets import gflops_of
from .uniform import uniform_schedule

NEAR = 0.01
"""How far the FLOPs of a published schedule may be from the target, as a share of it."""
IMAGENET_CLASSES = 1000
"""All published schedules were learned on classifiers of ImageNet-1k."""


@dataclass(frozen=True)
class NamedSchedule:
    """A schedule and what to call it, in a table or a message."""

    name: str
    schedule: Schedule


def schedule_for(model: nn.Module, gflops: float | str, method: str | Method = "diffrate") -> NamedSchedule:
    """The best schedule at hand of so many GFLOPs, with a name that says which kind it is.

    A published schedule, where the authors of DiffRate learned one at this cost on these very weights: the model's name
    and tag in timm are compared, the image size and the classes, and not the weights themselves. Else the
    :func:`uniform_schedule`, which needs no learning.

    Args:
        model: a supported model (docs/models.md).
        gflops: multiply-accumulates of one image, in units of 1e9, as the paper rounds them or to within 1 %; or a
            share of the uncompressed model's, such as ``"60%"``.
        method: as for :func:`compress`. The published schedules are DiffRate's.

    Raises:
        InputTypeError, InputValueError: as :func:`uniform_schedule`.
    """
    target = gflops_of(model, gflops)
    for known, schedule in _published_for(model) if str(method_of(method)) == "diffrate" else []:
        if known == target or abs(flops(model, schedule) / 1e9 - target) <= NEAR * target:
            return NamedSchedule(f"published {known:g} GFLOPs", schedule)
    return named_uniform(model, gflops, method)


def named_uniform(model: nn.Module, gflops: float | str, method: str | Method = "diffrate") -> NamedSchedule:
    """The :func:`uniform_schedule`, called so, or by the method where that is another one than DiffRate."""
    words = str(method_of(method))
    kind = "uniform" if words == "diffrate" else words
    target = gflops if isinstance(gflops, str) else f"{gflops:g} GFLOPs"
    return NamedSchedule(f"{kind} {target}", uniform_schedule(model, gflops, method=method))


def _published_for(model: nn.Module) -> list[tuple[float, Schedule]]:
    """The GFLOPs and numbers of the schedules that were learned on a model's weights."""
    adapter = adapter_for(model)
    if number_of_classes(model) != IMAGENET_CLASSES:  # trained further, or not yet
        return []
    found = [
        (known.gflops, Schedule.published(known.weights, known.gflops))
        for known in Schedule.available()
        if known.weights == adapter.name
    ]
    depth = sum(len(stage.blocks) for stage in adapter.stages)
    return [
        (gflops, schedule)
        for gflops, schedule in found
        if schedule.grid == adapter.stages[0].grid and len(schedule) == depth
    ]
