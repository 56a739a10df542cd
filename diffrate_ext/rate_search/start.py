"""Schedules of simple shape that a search can start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from ..compression.costing import costing_of
from ..compression.uniform import uniform_schedule
from ..cost_table import CostTable
from ..methods import DiffRate, Method
from ..models import Stage, adapter_for
from ..schedule import Schedule


def simple_schedules(
    model: nn.Module, target: float, method: Method, costs: CostTable | None = None
) -> Iterator[Schedule]:
    """Of ToMe its usual one. Of DiffRate: the same number of tokens goes in each block, or the same share; of two
    operations, both do half of it, or merging does all.

    The target is in GFLOPs, or with costs in milliseconds of a batch.

    Which of them is best depends on the model and on how much is to go: a search of some 100 steps does not get from
    one to the other.
    """
    for rule in (method, _SameShare(**vars(method))) if isinstance(method, DiffRate) else (method,):
        schedule = uniform_schedule(model, method=rule, **costing_of(model, costs).options(target))
        yield schedule
        if schedule.after_pruning is not None:
            tokens = adapter_for(model).stages[0].tokens
            yield replace(schedule, after_pruning=[tokens, *schedule.after_merging[:-1]])


class _SameShare(DiffRate):
    """DiffRate with another rule for its uniform schedule."""

    def uniform(self, stage: Stage, strength: float) -> list[int]:
        numbers, patches = [], float(stage.tokens - stage.prefix)
        for compressible in self.compressible(stage):
            patches *= 1 - strength * compressible
            numbers.append(min(stage.tokens, max(stage.fewest, stage.prefix + round(patches))))
        return numbers
