"""Schedules where only the FLOPs are given."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import timm
import torch
from torch import nn

from diffrate_ext import (
    InputTypeError,
    InputValueError,
    compress,
    flops,
    schedule_for,
    token_slots,
    uniform_schedule,
)
from diffrate_ext.compression.targets import gflops_of
from diffrate_ext.embedded import build_model
from diffrate_ext.schedule import Schedule


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize("target", [2.9, 2.91, "63%"])  # the schedule takes 2.9053 of 4.6 GFLOPs
def test_a_published_schedule_for_its_own_weights(target: float | str) -> None:
    chosen = schedule_for(on_meta("deit_small_patch16_224"), target)
    assert chosen.name == "published 2.9 GFLOPs"
    assert chosen.schedule == Schedule.published("deit_small_patch16_224.fb_in1k", 2.9)


def test_one_that_costs_less_than_its_name_says_goes_by_its_name() -> None:
    model = on_meta("vit_huge_patch14_224.mae", num_classes=1000)  # 92.1 GFLOPs are called 93.2
    assert schedule_for(model, 93.2).name == "published 93.2 GFLOPs"
    assert schedule_for(model, 92.11).name == "published 93.2 GFLOPs"


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("deit_small_patch16_224", {}, 3.0),  # none of this cost
        ("vit_small_patch16_224", {}, 2.9),  # the same architecture, trained otherwise
        ("vit_base_patch16_224.augreg_in1k", {}, 11.5),
        ("deit_small_patch16_224", {"num_classes": 10}, 2.9),  # trained further, on other images
        ("vit_base_patch16_224.mae", {}, 11.5),  # not yet a classifier
        ("deit_small_patch16_224", {"img_size": 240}, 2.9),
        ("deit_small_patch16_224", {"depth": 11}, 2.9),
    ],
)
def test_for_others_a_uniform_one(name: str, options: dict[str, Any], target: float) -> None:
    model = on_meta(name, **options)
    chosen = schedule_for(model, target)
    assert chosen.name == f"uniform {target:g} GFLOPs"
    assert chosen.schedule == uniform_schedule(model, target)


def test_the_published_schedules_are_diffrates() -> None:
    model = on_meta("deit_small_patch16_224")
    chosen = schedule_for(model, 2.9, "tome")
    assert (chosen.name, chosen.schedule.method) == ("tome 2.9 GFLOPs", "tome")
    assert schedule_for(model, 2.9, "diffrate:operations=prune").name == "diffrate:operations=prune 2.9 GFLOPs"


def test_compress_takes_it_and_says_which(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model()
    images = torch.randn(1, 1, 28, 28)
    with caplog.at_level(logging.INFO, logger="diffrate_ext"):
        assert compress(model, gflops="60%") is model
    assert caplog.messages == ["compressing by the uniform 60% schedule"]
    kept = [int(slots.max()) + 1 for slots in token_slots(model, images)]
    assert kept == list(uniform_schedule(build_model(), "60%").after_merging)
    with caplog.at_level(logging.INFO, logger="diffrate_ext"):
        compress(on_meta("deit_tiny_patch16_224"), gflops=0.8)
    assert caplog.messages[-1] == "compressing by the published 0.8 GFLOPs schedule"


def test_compress_with_gflops_for_a_method() -> None:
    model = compress(build_model(), gflops=0.25, method="evit")
    assert model._diffrate_plan.method.name == "evit"  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [{}, {"schedule": Schedule([197], [197]), "gflops": 1.0}])
def test_compress_takes_one_of_both(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="either a schedule or gflops"):
        compress(build_model(), **arguments)


def test_shares() -> None:
    model = build_model()
    assert gflops_of(model, "60%") == pytest.approx(0.6 * flops(model) / 1e9)
    assert gflops_of(model, 0.2) == 0.2
    assert uniform_schedule(model, "60%") == uniform_schedule(model, 0.6 * flops(model) / 1e9)
    for wrong in ("60", "sixty%", "%", ""):
        with pytest.raises(ValueError, match=r"such as '60%', got"):
            gflops_of(model, wrong)


@pytest.mark.parametrize("target", [0, -1.0, float("nan"), float("inf"), "0%"])
def test_targets_that_are_no_amount(target: float | str) -> None:
    with pytest.raises(InputValueError, match=f"gflops must be positive and finite, got {target}"):
        compress(on_meta("deit_small_patch16_224"), gflops=target)


@pytest.mark.parametrize("target", [[0.8], True, torch.tensor(1.0)])
def test_targets_that_are_no_number(target: Any) -> None:
    with pytest.raises(InputTypeError, match="gflops must be a number, or a share such as '60%', got "):
        compress(on_meta("deit_small_patch16_224"), gflops=target)
