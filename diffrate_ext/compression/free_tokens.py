"""Tokens that cost no time: a schedule on the far side of a step may as well keep more."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..cost_table import CostTable
from ..models import adapter_for
from ..schedule import Schedule
from .costing import costing_of


def keep_free_tokens(model: nn.Module, schedule: Schedule, costs: CostTable) -> Schedule:
    """The schedule with as many tokens in each block as take no more time in all, by a cost table.

    Time falls in steps: a block may take as long with 176 tokens as with 130. Blocks are raised from the first to the
    last, each to the most that is free with the others as they are. What merges still merges: less is pruned.

    Args:
        model: a supported model.
        schedule: one that fits it.
        costs: of the model.
    """
    adapter, costing = adapter_for(model), costing_of(model, costs)
    numbers = [list(stage) for stage in adapter.kept_numbers(schedule)]

    def time() -> float:
        return float(costing.of([[left for _, left in stage] for stage in numbers]))

    budget = time()
    for stage, kept in zip(adapter.stages, numbers, strict=True):
        before = stage.tokens
        for index, (pruned, merged) in enumerate(kept):
            for more in range(before - merged, 0, -1):
                kept[index] = min(before, pruned + more), merged + more
                if time() <= budget:
                    break
            else:
                kept[index] = pruned, merged
            before = kept[index][1]
    after = [pair for stage in numbers for pair in stage]
    return replace(
        schedule,
        after_pruning=None if schedule.after_pruning is None else tuple(pruned for pruned, _ in after),
        after_merging=tuple(merged for _, merged in after),
    )
