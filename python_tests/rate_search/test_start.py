"""Where a search starts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from searches import build
from tiny_costs import table_of
from tiny_search import gflops_of, plain_model, quick, tiny_batches

import diffrate_ext
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import schedule_by_rule, uniform_schedule
from diffrate_ext.methods import DiffRate
from diffrate_ext.rate_search import loop
from diffrate_ext.rate_search.settings import SearchSettings
from diffrate_ext.rate_search.start import simple_schedules


def test_simple_schedules() -> None:
    model = plain_model(depth=8)
    target = gflops_of(model, 0.6)
    number, number_merged, share, share_merged = simple_schedules(costing_of(model), target, DiffRate())
    assert number == uniform_schedule(model, target)
    for schedule in (number, number_merged, share, share_merged):
        assert flops(model, schedule) / 1e9 == pytest.approx(target, rel=0.01)
    for halves, merged in ((number, number_merged), (share, share_merged)):
        assert halves.after_merging == merged.after_merging
        assert list(merged.after_pruning or ()) == [65, *merged.after_merging[:-1]]
        assert list(halves.after_pruning or ()) != list(merged.after_pruning or ())
    patches = [kept - 1 for kept in share.after_merging]
    for before, after in itertools.pairwise(patches):
        assert after / before == pytest.approx(patches[1] / 64, abs=1.5 / before)


def test_simple_schedules_of_a_family_that_only_merges() -> None:
    model = build("CAFormer")
    schedules = list(simple_schedules(costing_of(model), 0.95 * flops(model) / 1e9, DiffRate()))
    assert [schedule.after_pruning for schedule in schedules] == [None, None]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_on_the_first_batches(seed: int) -> None:
    model, batches = plain_model(), tiny_batches(6, seed=seed)
    settings = SearchSettings(steps=3, flops_loss="relative", start="best")
    record = quick(model, batches, settings=settings).history.records[0]

    losses = []
    schedules = list(simple_schedules(costing_of(model), gflops_of(model, 0.6), DiffRate()))
    images, labels = (torch.cat(parts) for parts in zip(*batches[:3], strict=True))
    for schedule in schedules:
        logits = diffrate_ext.compressed_copy(model, schedule)(images)
        losses.append(F.cross_entropy(logits, labels).item())
    assert sorted(losses)[1] - min(losses) > 1e-5
    best = schedules[losses.index(min(losses))]
    # a proxy that keeps as many as another, or all, may say one more or less
    for found, wanted in ((record.after_pruning, best.after_pruning), (record.after_merging, best.after_merging)):
        assert all(abs(a - b) <= 1 for a, b in zip(found or (), wanted or (), strict=True))


def test_what_chooses_trains_too() -> None:
    batches, seen = tiny_batches(6), []

    class Loader:
        def __iter__(self) -> Any:
            for i, batch in enumerate(batches):
                seen.append(i)
                yield batch

    model = plain_model()
    best = quick(model, Loader(), settings=SearchSettings(steps=6, lr=0.1)).history
    assert seen == [0, 1, 2, 3, 4, 5]
    losses = [record.loss for record in best.records]
    assert len(set(losses)) == 6
    # with one schedule to choose from it is a search from there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "simple_schedules", lambda costing, target, method: [schedule_by_rule(costing, target, method)]
        )
        chosen = quick(model, batches, settings=SearchSettings(steps=6, lr=0.1)).history
    uniform = quick(model, batches, settings=SearchSettings(steps=6, lr=0.1, start="uniform")).history
    assert chosen == uniform


@pytest.mark.parametrize("start", ["best", "uniform"])
def test_a_search_for_time_starts_at_the_rule_and_not_at_its_steps(start: Any) -> None:
    """Where removing tokens is dear, the uniform schedule removes them in few blocks; the rates come from all."""
    model = plain_model(depth=8)
    costs = table_of(model, reduction=lambda tokens: 3.0)
    target = 0.7 * costing_of(model, costs).uncompressed
    settings = SearchSettings(steps=1, start=start)
    record = loop.search(model, tiny_batches(2), settings=settings, latency=target, costs=costs).history.records[0]
    removing = [before - after for before, after in itertools.pairwise(record.after_merging)]
    assert all(number > 0 for number in removing)
    uniform = uniform_schedule(model, latency=target, costs=costs).after_merging
    assert uniform.count(uniform[-1]) > 1
