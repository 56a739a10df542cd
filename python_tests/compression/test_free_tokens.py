"""Tokens that a cost table says are free."""

from __future__ import annotations

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


def test_merges_that_a_block_leaves_out_are_made_up_for() -> None:
    """Removing is so dear that the second block leaves it to the third, which then merges for both."""
    model = tiny_vit()
    costs = table_of(model, reduction=lambda tokens: 1.0)
    schedule = Schedule([17, 16, 12, 4], [17, 14, 10, 3], prefix=1, grid=(4, 4))
    found = keep_free_tokens(model, schedule, costs)
    assert found.after_merging == (17, 17, 10, 3)
    assert found.after_pruning == (17, 17, 14, 4)
    assert costing_of(model, costs).of_schedule(found) <= costing_of(model, costs).of_schedule(schedule)


def test_a_block_that_removes_nothing_goes_with_the_one_before() -> None:
    """EViT removes in three blocks, and is to remove in no others."""
    model = tiny_vit(depth=8)
    costs = table_of(model, attention=stairs, mlp=stairs, reduction=lambda tokens: 0.0)
    schedule = Schedule(None, [17, 17, 11, 11, 8, 8, 3, 3], prefix=1, grid=(4, 4), method="evit")
    assert keep_free_tokens(model, schedule, costs).after_merging == (17, 17, 13, 13, 9, 9, 5, 5)


def test_tome_still_merges_half_of_a_block_at_most() -> None:
    model = tiny_vit()
    schedule = Schedule(None, [17, 17, 9, 5], prefix=1, grid=(4, 4), method="tome")
    costs = table_of(model, attention=lambda n: 0.1 * (n > 9), mlp=lambda n: 0.0, reduction=lambda n: 5.0)
    found = keep_free_tokens(model, schedule, costs)
    compress(model, found)
    assert found.after_merging == (17, 17, 9, 9)  # and not 17 in the third block, from which 5 is too far


def test_several_stages() -> None:
    model = tiny_caformer()
    costs = table_of(model, attention=stairs, mlp=stairs, reduction=lambda tokens: 0.0)
    schedule = Schedule(None, [16, 12, 10, 8, 4, 4], prefix=0, grid=(4, 4), stages=[4, 2])
    found = keep_free_tokens(model, schedule, costs)
    assert found.after_merging == (16, 13, 13, 9, 4, 4)
    assert adapter_for(model).kept_numbers(found)
