"""Schedules of simple shape that a search can start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..compression.costing import Costing
from ..compression.uniform import schedule_by_rule
from ..methods import DiffRate, Method
from ..models import Stage
from ..schedule import Schedule


def simple_schedules(costing: Costing, target: float, method: Method) -> Iterator[Schedule]:
    """Of ToMe its usual one. Of DiffRate: the same number of tokens goes in each block, or the same share; of two
    operations, both do half of it, or merging does all.

    The target is counted as the costing counts. Of a target of time, tokens that cost none are not kept yet: a search
    is to see them go one by one.

    Which of them is best depends on the model and on how much is to go: a search of some 100 steps does not get from
    one to the other.
    """
    for rule in (method, _SameShare(**vars(method))) if isinstance(method, DiffRate) else (method,):
        schedule = schedule_by_rule(costing, target, rule)
        yield schedule
        if schedule.after_pruning is not None:
            tokens = costing.adapter.stages[0].tokens
            yield replace(schedule, after_pruning=[tokens, *schedule.after_merging[:-1]])


class _SameShare(DiffRate):
    """DiffRate with another rule for its uniform schedule."""

    def uniform(self, stage: Stage, strength: float) -> list[int]:
        numbers, patches = [], float(stage.tokens - stage.prefix)
        for compressible in self.compressible(stage):
            patches *= 1 - strength * compressible
            numbers.append(min(stage.tokens, max(stage.fewest, stage.prefix + round(patches))))
        return numbers
