"""Tokens that cost no time: a schedule on the far side of a step may as well keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from torch import nn

from ..cost_table import CostTable
from ..errors import InputValueError
from ..methods import method_of
from ..models import adapter_for
from ..schedule import Schedule
from .costing import costing_of


def keep_free_tokens(model: nn.Module, schedule: Schedule, costs: CostTable) -> Schedule:
    """The schedule with as many tokens in each block as take no more time in all, by a cost table.

    Time falls in steps: a block may take as long with 176 tokens as with 130. Blocks are raised from the first to the
    last, each to the most that is free with the others as they are; a block that removes nothing goes with the one
    before it. Where one then removes too little for its merges, the next one that removes makes up for them.

    Args:
        model: a supported model.
        schedule: one that fits it.
        costs: of the model.
    """
    adapter, costing, method = adapter_for(model), costing_of(model, costs), method_of(schedule.method)
    stages = [list(stage) for stage in adapter.kept_numbers(schedule)]

    def fits(budget: float) -> bool:
        if costing.of([[left for _, left in stage] for stage in stages]) > budget:
            return False
        try:
            method.check(adapter, [tuple(stage) for stage in stages])
        except InputValueError:  # ToMe, say, merges half of a block's tokens at most
            return False
        return True

    budget = costing.of_schedule(schedule)
    for stage, numbers in zip(adapter.stages, stages, strict=True):
        before, owed = stage.tokens, 0
        for blocks in _removing(numbers):
            pruned, merged = numbers[blocks[0]]
            merges = pruned - merged + owed
            for left in range(before, merged - 1, -1):
                first, *others = blocks
                numbers[first] = min(before, left + merges), left
                for index in others:
                    numbers[index] = left, left
                if left == merged or fits(budget):
                    break
            owed = merges - (numbers[blocks[0]][0] - left)
            before = left
    after = [pair for numbers in stages for pair in numbers]
    return replace(
        schedule,
        after_pruning=None if schedule.after_pruning is None else tuple(pruned for pruned, _ in after),
        after_merging=tuple(merged for _, merged in after),
    )


def _removing(numbers: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Blocks, each with those after it that remove nothing."""
    return [list(blocks) for _, blocks in groupby(range(len(numbers)), lambda index: numbers[index][1])]
