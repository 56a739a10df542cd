"""Tokens that a cost table says are free."""

from __future__ import annotations

import pytest
from tiny_costs import table_of
from tiny_models import tiny_caformer, tiny_vit

from diffrate_ext import Schedule, compress, uniform_schedule
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.compression.free_tokens import keep_free_tokens
from diffrate_ext.models import adapter_for


def stairs(tokens: int) -> float:
    """Up to 5, 9, 13, ... take alike."""
    return float((tokens + 2) // 4)


def test_as_many_as_the_step_has_room_for() -> None:
    model = tiny_vit()
    costs = table_of(model, attention=stairs, mlp=stairs, reduction=lambda tokens: 0.0)
    schedule = Schedule([17, 14, 12, 4], [17, 11, 7, 2], prefix=1, grid=(4, 4))
    found = keep_free_tokens(model, schedule, costs)
    assert found.after_merging == (17, 13, 9, 5)
    assert found.after_pruning == (17, 16, 13, 7)  # as many merge as before
    assert costing_of(model, costs).of([list(found.after_merging)]) == costing_of(model, costs).of([[17, 11, 7, 2]])
    compress(model, found)


def test_where_every_token_costs_nothing_is_free() -> None:
    model = tiny_vit()
    schedule = Schedule([17, 14, 12, 4], [17, 11, 7, 2], prefix=1, grid=(4, 4))
    assert keep_free_tokens(model, schedule, table_of(model)) == schedule


def test_not_removing_at_all_may_be_cheaper() -> None:
    model = tiny_vit()
    costs = table_of(model, reduction=lambda tokens: 5.0)
    schedule = Schedule(None, [17, 16, 15, 15], prefix=1, grid=(4, 4))
    assert keep_free_tokens(model, schedule, costs).after_merging == (17, 17, 17, 17)


def test_uniform_schedules_take_what_is_free() -> None:
    model = tiny_vit(depth=6)
    costs = table_of(model, attention=stairs, mlp=stairs, reduction=lambda tokens: 0.0)
    schedule = uniform_schedule(model, speedup=1.3, costs=costs)
    assert keep_free_tokens(model, schedule, costs) == schedule
    assert all(number in (5, 9, 13, 17) for number in schedule.after_merging[:-1])


@pytest.mark.parametrize("pruned", [None])
def test_several_stages(pruned: None) -> None:
    model = tiny_caformer()
    costs = table_of(model, attention=stairs, mlp=stairs, reduction=lambda tokens: 0.0)
    schedule = Schedule(pruned, [16, 12, 10, 8, 4, 4], prefix=0, grid=(4, 4), stages=[4, 2])
    found = keep_free_tokens(model, schedule, costs)
    assert found.after_merging == (16, 13, 13, 9, 4, 4)
    assert adapter_for(model).kept_numbers(found)
