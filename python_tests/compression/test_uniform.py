"""The schedule by a simple rule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_costs import table_of
from tiny_models import tiny_vit

from diffrate_ext import InputTypeError, InputValueError
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import is_uniform, uniform_schedule
from diffrate_ext.schedule import Schedule


@pytest.mark.parametrize("share", [0.5, 0.65, 0.9, 1.0])
def test_uniform_removes_the_same_number_everywhere_and_meets_the_target(share: float) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    target = share * flops(model) / 1e9
    schedule = uniform_schedule(model, target)
    assert flops(model, schedule) / 1e9 == pytest.approx(target, rel=0.01)
    assert schedule.grid == (14, 14)
    assert schedule.model == "deit_small_patch16_224.fb_in1k"
    steps = schedule.kept_numbers(197)
    assert steps[0] == (197, 197)
    removed = [before[1] - after[1] for before, after in pairwise(steps)]
    removed = removed[:-1] if steps[-1][1] == 2 else removed  # there may be fewer to remove in the last block
    assert max(removed) - min(removed) <= 1
    for (_, before), (k_p, k_m) in pairwise(steps):
        assert abs((before - k_p) - (k_p - k_m)) <= 1


def test_uniform_only_merges_the_inner_blocks_of_a_caformer() -> None:
    with torch.device("meta"):
        model = timm.create_model("caformer_s36")
    schedule = uniform_schedule(model, 6.0)
    assert flops(model, schedule) / 1e9 == pytest.approx(6.0, rel=0.01)
    assert schedule.after_pruning is None
    assert schedule.after_merging[0] == 196
    assert schedule.after_merging[17] == schedule.after_merging[16] < 196
    assert schedule.after_merging[18:] == (49, 49, 49)


@pytest.mark.parametrize("gflops", [0, 0.0001, 99, float("nan")])
def test_uniform_refuses_what_cannot_be_reached(gflops: float) -> None:
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5)
    said = (
        r"GFLOPs cannot be reached: the model takes .* uncompressed"
        if gflops > 0
        else "gflops must be positive and finite"
    )
    with pytest.raises(ValueError, match=said):
        uniform_schedule(model, gflops)


@pytest.mark.parametrize("method", ["diffrate", "diffrate:operations=merge", "tome", "evit", "random"])
def test_a_uniform_schedule_is_told_from_others(method: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    for gflops in (2.6, 3.0, 3.7):
        schedule = uniform_schedule(model, gflops, method=method)
        assert is_uniform(model, schedule)
        kept = list(schedule.after_merging)
        kept[6] = (kept[6] + kept[7]) // 2 - 1
        assert not is_uniform(model, replace(schedule, after_merging=kept))
    assert not is_uniform(model, Schedule.published("deit_small_patch16_224", 2.9))


def test_fewer_tokens_than_the_rule_may_leave_are_not_uniform() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    assert not is_uniform(model, Schedule([197, *[2] * 11], [197, *[2] * 11]))


def test_a_target_of_time() -> None:
    """Where an MLP costs nothing and attention everything, the tokens that come are what counts."""
    model = tiny_vit(depth=8)
    costs = table_of(model, mlp=lambda tokens: 0.0, reduction=lambda tokens: 0.0, fixed=0.0)
    faster = uniform_schedule(model, speedup=1.5, costs=costs)
    came = [17, *faster.after_merging[:-1]]
    assert sum(came) == pytest.approx(17 * 8 / 1.5, abs=3)
    same = uniform_schedule(model, latency=0.1 * 17 * 8 / 1.5, costs=costs)
    assert same == faster
    assert faster != uniform_schedule(model, f"{100 / 1.5}%")


def test_targets_of_time_that_are_refused() -> None:
    model, costs = tiny_vit(), table_of(tiny_vit())
    for options, message in (
        ({}, "name one target: gflops, speedup or latency; got none"),
        ({"gflops": "60%", "speedup": 2}, "got gflops and speedup"),
        ({"speedup": 2}, "speedup needs costs: what diffrate_ext.profile_model"),
        ({"gflops": "60%", "costs": costs}, "with costs name a target of time"),
        ({"speedup": True, "costs": costs}, "speedup must be a number, got bool"),
        ({"speedup": 2, "costs": "table.json"}, "costs must be a CostTable, .* got str"),
    ):
        with pytest.raises(InputTypeError, match=message):
            uniform_schedule(model, **options)
    for options, message in (
        ({"speedup": 0.0}, "speedup must be positive and finite, got 0"),
        ({"latency": float("inf")}, "latency must be positive and finite, got inf"),
        ({"speedup": 50}, "ms cannot be reached: the model takes 21.4 uncompressed, and .* as few tokens as a uniform"),
    ):
        with pytest.raises(InputValueError, match=message):
            uniform_schedule(model, costs=costs, **options)
    with pytest.raises(InputValueError, match=r"another model, .* 4 blocks on 17 tokens .*: profile it"):
        uniform_schedule(tiny_vit(depth=5), speedup=1.2, costs=costs)
    with pytest.raises(InputValueError, match="the costs are of another model"):
        uniform_schedule(tiny_vit(embed_dim=32), speedup=1.2, costs=costs)
