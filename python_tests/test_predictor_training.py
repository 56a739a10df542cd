"""Training DynamicViT's predictors: masks that stand for dropped tokens, gradients, and what is learnt."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_caformer, tiny_images, tiny_predictors, tiny_vit
from torch import Tensor

from diffrate_ext import (
    DivergedError,
    PredictorSettings,
    Schedule,
    compressed_copy,
    flops,
    ops,
    predictor_training,
    train_predictors,
    uncompressed_copy,
)
from diffrate_ext.compression.patching import install_plans
from diffrate_ext.errors import InputTypeError, InputValueError
from diffrate_ext.methods import DynamicViT, Predictors
from diffrate_ext.models import adapter_for
from diffrate_ext.predictor_training import MaskingPlan

KEPT = [17, 12, 12, 8]
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "mean pool": {"global_pool": "avg"},
    "no class token": {"global_pool": "avg", "class_token": False},
    "attention pool": {"global_pool": "map", "class_token": False},
    "max pool": {"global_pool": "max"},
}


def schedule_for(model: Any) -> Schedule:
    prefix = adapter_for(model).rules.prefix
    return Schedule(None, [prefix + number - 1 for number in KEPT], prefix=prefix)


def masking(model: Any, predictors: Predictors) -> MaskingPlan:
    adapter = adapter_for(model)
    plan = MaskingPlan(predictors, adapter.rules, adapter.stages[0])
    install_plans(adapter, [plan])
    return plan


@pytest.mark.parametrize("name", MODELS)
def test_masked_tokens_count_for_as_much_as_dropped_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the decisions of inference, the answers are those of inference."""
    model = tiny_vit(**MODELS[name])
    predictors, schedule, images = tiny_predictors(model), schedule_for(model), tiny_images(model)
    numbers = [kept - 1 for kept in KEPT]
    there: list[Tensor] = []

    def best(log_probabilities: Tensor) -> Tensor:
        scores = log_probabilities[..., 0]
        scores = scores if not there else scores.masked_fill(there[-1] == 0, -torch.inf)
        chosen = scores.topk(numbers[len(there)], dim=1).indices
        there.append(torch.zeros_like(scores).scatter_(1, chosen, 1.0))
        return there[-1]

    monkeypatch.setattr(predictor_training, "decisions", best)
    student = uncompressed_copy(model)
    plan = masking(student, predictors)
    with torch.no_grad():
        found = student(images)
        wanted = compressed_copy(model, schedule, method=DynamicViT(predictors))(images)
        assert not torch.allclose(wanted, model(images), atol=1e-2)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert [int(kept.sum()) for kept in plan.kept] == [3 * number for number in numbers]


def test_what_is_masked_stays_masked() -> None:
    model = tiny_vit()
    plan = masking(model, tiny_predictors(model))
    with torch.no_grad():
        for _ in range(2):  # the second pass starts anew
            model(tiny_images(model))
            assert len(plan.kept) == 4
            assert set(torch.stack(plan.kept).unique().tolist()) == {0.0, 1.0}
            for before, after in zip(plan.kept, plan.kept[1:], strict=False):
                assert (after <= before).all()
            assert (plan.kept[-1] < plan.kept[0]).any()


def test_one_patch_always_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of those that are there: heads that pool over patches need one."""
    model = tiny_vit(global_pool="avg", class_token=False)
    predictors = tiny_predictors(model)
    asked: list[Tensor] = []

    def none(log_probabilities: Tensor) -> Tensor:
        asked.append(log_probabilities[..., 0])
        return torch.zeros_like(asked[-1])

    monkeypatch.setattr(predictor_training, "decisions", none)
    plan = masking(model, predictors)
    with torch.no_grad():
        assert model(tiny_images(model)).isfinite().all()
    best = F.one_hot(asked[0].argmax(1), 16).float()
    assert all(torch.equal(kept, best) for kept in plan.kept)
    assert any(not torch.equal(scores.argmax(1), asked[0].argmax(1)) for scores in asked[1:])


def test_gradients_reach_every_predictor() -> None:
    """From the answers: but for the last block's, whose patches a class token sees no more."""
    model = tiny_vit().requires_grad_(False)
    torch.manual_seed(0)
    predictors = Predictors.untrained(adapter_for(model), range(4))  # which are not yet sure of anything
    masking(model, predictors)
    model(tiny_images(model)).square().sum().backward()
    for block in (0, 1, 2):
        predictor = predictors.get(block)
        assert predictor is not None
        for name, parameter in predictor.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, (block, name)


def test_hidden_tokens_that_draw_attention_do_not_drown_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token is worth is what would change if it were there, not the derivative where it is not."""
    model = tiny_vit()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)
    predictors = Predictors.untrained(adapter_for(model), [1])
    plan = masking(model.requires_grad_(False), predictors)

    def largest() -> float:
        torch.manual_seed(0)
        loss = model(tiny_images(model)).square().sum()
        (kept,) = plan.kept
        kept.retain_grad()
        loss.backward()
        assert kept.grad is not None
        return float(kept.grad.abs().max())

    found, masked_attention = largest(), ops.masked_attention

    def derivative(*args: Any, mask_gradient: str, **options: Any) -> Any:
        assert mask_gradient == "difference"
        return masked_attention(*args, **options)

    monkeypatch.setattr(ops, "masked_attention", derivative)
    assert found < largest() / 10


def train(model: Any, batches: Any, share: float = 0.7, **settings: Any) -> Predictors:
    return train_predictors(model, batches, share * flops(model) / 1e9, PredictorSettings(**settings))


@pytest.mark.parametrize("name", ["class token", "mean pool"])
def test_trained_predictors_keep_more_of_the_model(name: str) -> None:
    """Than random ones do: by the answers to the images that they learnt from."""
    model = tiny_vit(**MODELS[name])
    images = tiny_images(model, 32)
    schedule = schedule_for(model)

    def distance(**settings: Any) -> float:
        predictors = train_predictors(model, [images], schedule, PredictorSettings(feature_weight=0, **settings))
        compressed = compressed_copy(model, schedule, method=DynamicViT(predictors))
        with torch.no_grad():
            found, wanted = compressed(images).log_softmax(1), model(images).log_softmax(1)
        return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))

    untrained = sum(distance(steps=1, lr=0.0, seed=seed) for seed in range(4)) / 4
    assert distance(steps=60, lr=1e-2) < 0.8 * untrained


def test_a_term_of_the_loss_falls_when_it_counts() -> None:
    """The distance of the kept tokens, which only trained weights can make much smaller."""
    model = tiny_vit()
    images, losses = tiny_images(model, 8), list[float]()
    settings = PredictorSettings(steps=40, lr=0.2, feature_weight=10, ratio_weight=0, train_weights=True)
    train_predictors(model, [images], schedule_for(model), settings, report=lambda _, loss: losses.append(loss))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_share_that_is_kept_meets_its_target() -> None:
    """With the other terms off, the predictors learn how many to keep, as the schedule says it."""
    model = tiny_vit()
    images = tiny_images(model, 32)
    settings = PredictorSettings(steps=80, lr=1e-2, feature_weight=0, kl_weight=0, ratio_weight=100)
    predictors = train_predictors(model, [images], Schedule(None, [17, 14, 14, 4]), settings)
    assert predictors.blocks == (1, 3)
    plan = masking(model, predictors)
    torch.manual_seed(0)
    with torch.no_grad():
        model(tiny_images(model, 200))
    assert [float(kept.mean()) for kept in plan.kept] == pytest.approx([13 / 16, 3 / 16], abs=0.1)


def test_random_choices_follow_from_the_seed_and_nothing_else() -> None:
    model = tiny_vit()
    images = tiny_images(model, 12)

    def shuffled(_: int) -> Any:
        return [images[torch.randperm(12)[:4]] for _ in range(3)]

    def trained(seed: int) -> Tensor:
        random.random(), torch.rand(1)  # other generators than the seed's must not matter
        found = train(model, shuffled, steps=4, seed=seed)
        return torch.cat([p.flatten() for p in found.parameters()])

    state = torch.random.get_rng_state()
    first = trained(1)
    torch.manual_seed(7)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))
    torch.random.set_rng_state(state)
    train(model, shuffled, steps=1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("train_weights", [False, True])
def test_the_model_is_left_as_it_is_but_for_its_weights(train_weights: bool) -> None:
    model = tiny_vit()
    model.pos_embed.requires_grad_(False)
    images = tiny_images(model)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    predictors = train(model, [(images, torch.tensor([0, 1, 2]))], steps=2, train_weights=train_weights)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "pos_embed"), name
        changed = not torch.equal(parameter, before[name])
        assert changed == (train_weights and name != "pos_embed"), name
        assert train_weights or parameter.grad is None
    assert not any(p.requires_grad for p in predictors.parameters())
    assert predictors.blocks == (1, 2, 3)


def test_a_trained_model_learns_from_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompressed model's answers, as they were before its weights moved."""
    answers: list[Tensor] = []
    keep = predictor_training.Lesson._answers

    def noted(self: Any, found: Tensor, wanted: Tensor, labels: Tensor | None) -> Tensor:
        answers.append(wanted)
        return keep(self, found, wanted, labels)

    monkeypatch.setattr(predictor_training.Lesson, "_answers", noted)
    model = tiny_vit()
    images = tiny_images(model)
    with torch.no_grad():
        before = model(images)
    train(model, [images], steps=3, lr=0.1, train_weights=True)
    for answer in answers:
        torch.testing.assert_close(answer, before)
    with torch.no_grad():
        assert not torch.allclose(model(images), before, atol=1e-3)


def test_labels_features_and_soft_labels() -> None:
    model = tiny_vit()
    images = tiny_images(model)
    hard = torch.tensor([0, 1, 2])
    soft = F.one_hot(hard, 5).float()
    losses: list[list[float]] = []
    for batch in (images, (images, hard), (images, soft)):
        losses.append([])
        settings = PredictorSettings(steps=1)
        train_predictors(model, [batch], schedule_for(model), settings, report=lambda _, loss: losses[-1].append(loss))
    assert losses[1] == pytest.approx(losses[2])
    assert losses[0] != pytest.approx(losses[1])
    with pytest.raises(InputValueError, match=r"labels must lie in 0 \.\. 4"):
        train(model, [(images, hard + 3)], steps=1)
    features = tiny_vit(num_classes=0)
    train(features, [(images, hard + 900)], steps=2)  # where labels say nothing


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: train(tiny_caformer(), []), InputValueError, "a MetaFormer is only merged"),
        (lambda: train(tiny_vit(), []), InputValueError, "the loader gave no images"),
        (lambda: train(tiny_vit(), [], share=2), InputValueError, "cannot be reached"),
        (lambda: train_predictors(tiny_vit(), [], Schedule(None, [17] * 4)), InputValueError, "removes no tokens"),
        (lambda: train_predictors(tiny_vit(), [], "half"), InputTypeError, "must be GFLOPs or a Schedule, got str"),
        (
            lambda: train(tiny_vit(dynamic_img_size=True), [torch.zeros(1, 3, 32, 32)]),
            InputValueError,
            "the model's own size: 17 tokens, got 65",
        ),
        (lambda: train(tiny_vit(), [torch.full((1, 3, 16, 16), torch.nan)]), DivergedError, "step 0: the loss is not"),
        (lambda: PredictorSettings(steps=0), InputValueError, "steps must be a whole number of at least 1"),
        (lambda: PredictorSettings(lr=-1), InputValueError, "lr must be a finite number of at least 0"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
