"""Methods side by side, and the plot of it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from tiny_models import tiny_caformer, tiny_images, tiny_schedule, tiny_vit
from torch import Tensor, nn

from diffrate_ext import Schedule, compare, compressed_copy, evaluate, flops, uniform_schedule
from diffrate_ext.comparison import Compared
from diffrate_ext.comparison_plot import draw_comparison
from diffrate_ext.errors import InputTypeError, InputValueError
from diffrate_ext.methods import ToMe

QUICK: dict[str, Any] = {"rounds": 1, "batch_size": 2}


def target(model: nn.Module, share: float = 0.75) -> float:
    return share * flops(model) / 1e9


def features(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


def test_each_method_at_each_target() -> None:
    model = tiny_vit()
    images, labels = tiny_images(model, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    targets = [target(model), target(model, 0.9)]
    first, *rows = compare(model, batches, targets, ["diffrate", "tome"], **QUICK)
    assert (first.method, first.schedule, first.cosine, first.speed) == ("uncompressed", None, pytest.approx(1), None)
    assert first.gflops == flops(model) / 1e9
    assert first.evaluation == replace(evaluate(model, batches), agreement=1.0)
    assert [row.method for row in rows] == ["diffrate", "diffrate", "tome", "tome"]
    for row, wanted in zip(rows, targets * 2, strict=True):
        assert row.schedule == uniform_schedule(model, wanted, method=row.method)
        assert row.gflops == flops(model, row.schedule) / 1e9
        compressed = compressed_copy(model, row.schedule, method=row.method)
        assert row.evaluation == evaluate(compressed, batches, model)
        cosine = nn.functional.cosine_similarity(features(model, images), features(compressed, images))
        assert row.cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert row.speed is not None
        assert row.speed.gflops == row.gflops
    assert rows[0].evaluation.predictions.tolist() != rows[1].evaluation.predictions.tolist() or (
        rows[0].cosine != rows[1].cosine
    )


def test_all_methods_that_can_run_the_model_by_default() -> None:
    def found(model: nn.Module, **options: Any) -> list[str]:
        rows = compare(model, [tiny_images(model)], **QUICK, **options)
        return list(dict.fromkeys(row.method for row in rows))

    assert found(tiny_vit()) == ["uncompressed", "diffrate", "tome", "evit", "random"]
    no_class_token = tiny_vit(global_pool="avg", class_token=False)
    assert found(no_class_token) == ["uncompressed", "diffrate", "tome", "random"]
    caformer = tiny_caformer()
    assert found(caformer, gflops=[target(caformer, 0.9)]) == ["uncompressed", "diffrate", "tome"]


def test_a_model_without_a_head_has_features_alone() -> None:
    model = tiny_vit(num_classes=0)
    rows = compare(model, [tiny_images(model)], [target(model)], ["tome"], **QUICK)
    for row in rows:
        assert row.evaluation.agreement is None
        assert row.evaluation.top1 is None
    assert 0.5 < rows[1].cosine < 1
    assert len(draw_comparison(rows, "features").axes) == 2


@pytest.mark.parametrize("label", [0, 900])
def test_labels_say_nothing_about_features(label: int) -> None:
    model = tiny_vit(num_classes=0)
    batch = tiny_images(model), torch.full((3,), label)
    rows = compare(model, [batch], [target(model)], ["tome"], **QUICK)
    assert [(row.evaluation.top1, row.evaluation.loss, row.evaluation.agreement) for row in rows] == [(None,) * 3] * 2


def test_a_schedule_for_another_model() -> None:
    model = tiny_vit()
    model.pretrained_cfg = {"architecture": "mine"}
    other = replace(tiny_schedule(model), model="deit_base_patch16_224.fb_in1k")
    with pytest.raises(InputValueError, match="the schedule was made for deit_base"):
        compare(model, [tiny_images(model)], schedules={"other": other}, **QUICK)
    assert len(compare(model, [tiny_images(model)], schedules={"other": other}, any_model=True, **QUICK)) == 2


def test_a_distilled_model() -> None:
    model = tiny_vit(VisionTransformerDistilled)
    rows = compare(model, [tiny_images(model)], [target(model)], ["diffrate"], **QUICK)
    assert 0 < rows[1].cosine < 1


def test_schedules_by_name() -> None:
    model = tiny_vit()
    schedules = {"learned": tiny_schedule(model), "nothing": Schedule(None, [17] * 4)}
    rows = compare(model, [tiny_images(model)], schedules=schedules, **QUICK)
    assert [(row.method, row.label) for row in rows[1:]] == [("diffrate", "learned"), ("diffrate", "nothing")]
    assert rows[1].schedule == schedules["learned"]
    assert rows[2].cosine == pytest.approx(1, abs=1e-6)
    with_targets = compare(model, [tiny_images(model)], [target(model)], ["tome"], schedules=schedules, **QUICK)
    assert [row.method for row in with_targets[1:]] == ["tome", "diffrate", "diffrate"]


def test_a_method_with_options() -> None:
    model = tiny_vit()
    methods = [ToMe(), ToMe(proportional_attention=False)]
    rows = compare(model, [tiny_images(model)], [target(model)], methods, **QUICK)
    assert rows[1].cosine != rows[2].cosine


def test_leaves_the_model_as_it_was_and_says_how_far_it_is() -> None:
    model = tiny_vit().train()
    seen: list[tuple[str, int]] = []
    compare(model, [tiny_images(model)] * 2, [target(model)], ["tome"], on_progress=lambda *a: seen.append(a), **QUICK)
    assert seen == [("images", 1), ("images", 2), ("timing", 1)]
    assert model.training
    assert type(model.blocks[0]).__name__ == "Block"
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gflops": 0.8}, "gflops must be a list or a tuple, got 0.8"),
        ({"gflops": "60%"}, "gflops must be a list or a tuple, got '60%'"),
        ({"methods": "random"}, "methods must be a list or a tuple, got 'random'"),
        ({"schedules": []}, "schedules must be a dict of names and schedules, got list"),
    ],
)
def test_one_thing_instead_of_several(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputTypeError, match=message):
        compare(tiny_vit(), [], **arguments)


def test_targets_out_of_reach() -> None:
    """By default a method that cannot go so far is left out; one that was asked for says so."""
    model = tiny_vit()
    low = 0.45 * flops(model) / 1e9
    assert [row.method for row in compare(model, [tiny_images(model)], [low], **QUICK)] == ["uncompressed", "tome"]
    with pytest.raises(InputValueError, match="GFLOPs cannot be reached"):
        compare(model, [tiny_images(model)], [low], ["diffrate", "tome"], **QUICK)
    for bad in (0.0, -1.0, 99.0):
        said = "GFLOPs cannot be reached" if bad > 0 else "gflops must be positive"
        with pytest.raises(InputValueError, match=said):
            compare(model, [tiny_images(model)], [bad], **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": []}, "methods must name at least one method"),
        ({"methods": ["dynamic"]}, "method must be one of diffrate, tome, evit, dynamicvit, random, got 'dynamic'"),
        ({"gflops": [], "methods": ["tome"]}, "there is nothing to compare"),
        ({"rounds": 0, "loader": None}, "rounds must be at least 1, got 0"),
        ({"batch_size": 0, "loader": None}, "batch_size must be at least 1, got 0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    model = tiny_vit()
    with pytest.raises(InputValueError, match=re.escape(message)):
        compare(model, **{"loader": [tiny_images(model)], **QUICK, **options})


def test_no_images() -> None:
    with pytest.raises(InputValueError, match="the loader gave no images"):
        compare(tiny_vit(), [], **QUICK)


# --- the plot


@pytest.fixture(scope="module")
def rows() -> list[Compared]:
    model = tiny_vit()
    targets = [target(model), target(model, 0.9)]
    return compare(model, [tiny_images(model)], targets, ["diffrate", "tome"], **QUICK)


def test_the_plot_shows_every_row(rows: list[Compared]) -> None:
    figure = draw_comparison(rows, "tiny ViT")
    agreement, _, cosine, speed = figure.axes
    assert figure.get_suptitle() == "tiny ViT, 3 images"
    assert agreement.get_ylabel() == "agreement (same class as uncompressed)"  # there are no labels
    for axis, cost in ((cosine, lambda row: row.gflops), (speed, lambda row: row.speed.speed_up)):
        lines = {line.get_label(): line for line in axis.get_lines()}
        for method in ("diffrate", "tome"):
            points = sorted((cost(row), row.cosine) for row in rows if row.method == method)
            assert lines[f"{method}, uniform"].get_xydata().tolist() == [list(point) for point in points]
    assert cosine.xaxis_inverted()
    assert len({line.get_marker() for line in cosine.get_lines() if "uniform" in str(line.get_label())}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["uncompressed", "diffrate, uniform", "tome, uniform"]
    assert agreement.yaxis.get_major_formatter()(0.925) == "92.5%"
    assert agreement.yaxis.get_major_formatter()(0.9) == "90%"
    assert "%" not in cosine.yaxis.get_major_formatter()(0.925)
    assert speed.xaxis.get_major_formatter()(1.25) == "1.25x"


def test_the_plot_shows_accuracy_where_there_are_labels(rows: list[Compared]) -> None:
    labelled = [replace(row, evaluation=replace(row.evaluation, top1=0.5, loss=1.0)) for row in rows]
    assert [axis.get_ylabel() for axis in draw_comparison(labelled, "tiny ViT").axes[::2]] == [
        "top-1 accuracy",
        "cosine to uncompressed features",
    ]


def test_schedules_are_drawn_apart_from_their_method(rows: list[Compared]) -> None:
    learned = replace(rows[1], label="learned", uniform=False)
    axis = draw_comparison([*rows, learned], "tiny ViT").axes[2]
    points = {line.get_label(): len(line.get_xydata()) for line in axis.get_lines()}
    assert (points["diffrate, uniform"], points["learned"]) == (2, 1)


def test_nothing_to_draw(rows: list[Compared]) -> None:
    with pytest.raises(InputValueError, match="no compressed model to draw"):
        draw_comparison(rows[:1], "tiny ViT")
