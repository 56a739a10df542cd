"""Weights that learn under a schedule."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import tiny_caformer, tiny_images, tiny_schedule
from tiny_search import gflops_of, plain_model, tiny_batches, tiny_model

from diffrate_ext import (
    FinetuneSettings,
    Schedule,
    compress,
    compressed_copy,
    evaluate,
    finetune,
    restore,
    token_slots,
    uniform_schedule,
)
from diffrate_ext.finetuning.drop_path import drop_paths
from diffrate_ext.finetuning.loop import _Finetuning

FAST = {"lr": 0.3, "min_lr": 0.01, "drop_path": 0.0, "smoothing": 0.0}


def schedule_for(model, share=0.6, method="diffrate"):
    return uniform_schedule(model, gflops_of(model, share), method=method)


def settings(steps=20, **changes):
    return FinetuneSettings(**{"steps": steps, **FAST, **changes})


def only_images(batches):
    return [images for images, _ in batches]


@pytest.fixture(scope="module")
def trained():
    """A model, its state before, its schedule, and what twenty steps made of it."""
    model = plain_model()
    before = copy.deepcopy(model.state_dict())
    schedule = schedule_for(model)
    return model, before, schedule, finetune(model, schedule, tiny_batches(), settings(), validation=tiny_batches())


def test_the_loss_falls_and_the_evaluation_shows_it(trained):
    model, _, schedule, result = trained
    records = result.history.records
    assert len(records) == 20
    assert records[-1].loss < 0.9 * records[0].loss
    expected = evaluate(compressed_copy(model, schedule), tiny_batches(), model)
    assert (result.before.top1, result.before.agreement) == (expected.top1, expected.agreement)
    assert result.before.loss == pytest.approx(expected.loss)
    after = evaluate(result.model, tiny_batches(), model)
    assert (result.after.top1, result.after.agreement, result.after.loss) == (after.top1, after.agreement, after.loss)
    assert result.uncompressed.top1 == evaluate(model, tiny_batches()).top1
    assert result.uncompressed.agreement == 1
    assert result.gain == after.top1 - expected.top1 > 0.1


def test_a_copy_is_trained(trained):
    model, before, _, result = trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model).__name__ == "VisionTransformer"
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = [name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == list(before)


def test_the_trained_model_is_compressed_by_the_schedule(trained):
    _, _, schedule, result = trained
    assert result.schedule == schedule
    images = tiny_batches()[0][0]
    kept = [int(slots.max()) + 1 for slots in token_slots(result.model, images)]
    assert kept == list(schedule.after_merging)
    assert not any(module.training for module in result.model.modules())
    with torch.no_grad():
        found = result.model(images)
        weights = restore(copy.deepcopy(result.model))
        assert not torch.allclose(weights(images), found, atol=1e-3)
        assert torch.equal(compress(weights, schedule)(images), found)


@pytest.mark.parametrize("method", ["diffrate", "tome", "evit", "tome:proportional_attention=false"])
def test_the_first_step_follows_the_gradient_of_what_runs_at_inference(method):
    """Tokens are dropped by the method, and the gradient is that of a loop that anyone would write."""
    model = plain_model()
    schedule = schedule_for(model, method=method)
    (images, labels), *_ = tiny_batches()
    records = []
    options = settings(1, smoothing=0.2, distill=0.3)
    result = finetune(model, schedule, [(images, labels)], options, report=records.append)
    assert result.schedule.method == method

    said = model(images).detach().softmax(1)
    compressed = compress(copy.deepcopy(model), schedule, method=method).train()
    found = compressed(images)
    loss = 0.3 * F.cross_entropy(found, said) + 0.7 * F.cross_entropy(found, labels, label_smoothing=0.2)
    loss.backward()
    loss = loss.detach()
    gradient = torch.stack([parameter.grad.norm() for parameter in compressed.parameters()]).norm()
    assert records[0].loss == pytest.approx(float(loss), rel=1e-5)
    assert records[0].gradient == pytest.approx(float(gradient), rel=1e-4)
    assert records[0].accuracy == pytest.approx(float((found.argmax(1) == labels).float().mean()))


def test_a_method_of_the_callers_counts_before_the_schedules():
    model = plain_model()
    schedule = schedule_for(model)
    result = finetune(model, schedule, tiny_batches(), settings(1), method="random")
    assert result.schedule.method == "random"
    assert schedule.method == "diffrate"


def test_gradients_are_shortened():
    """Adam alone does not see their length, but that of the first beside the second."""

    def weights_after(clip):
        batches = [(100 * images, labels) for images, labels in tiny_batches(1)] + tiny_batches(1, seed=1)
        result = finetune(plain_model(), schedule_for(plain_model()), batches, settings(2, clip=clip))
        return result.model.state_dict()["head.weight"], [record.gradient for record in result.history.records]

    (short, first), (free, second) = weights_after(1e-3), weights_after(math.inf)
    assert first[0] == second[0] > 1e-2
    assert not torch.allclose(short, free, rtol=0, atol=1e-6)


def test_learning_rates_rise_fall_and_follow_the_number_of_images():
    options = FinetuneSettings(steps=100, lr=1e-3, min_lr=1e-4, warmup_steps=9)
    assert options.lr_at(0, 512) == pytest.approx(1e-4)
    assert options.lr_at(9, 512) == pytest.approx(1e-3)
    assert options.lr_at(9, 1024) == pytest.approx(2e-3)
    falling = [options.lr_at(step, 512) for step in range(9, 101)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(1e-4)
    assert FinetuneSettings(steps=100).warmup == 5
    assert FinetuneSettings().last_lr == pytest.approx(1e-6)

    records = []
    two = [(images[:2], labels[:2]) for images, labels in tiny_batches()]
    finetune(plain_model(), schedule_for(plain_model()), two, options, report=records.append)
    assert [record.lr for record in records] == [options.lr_at(step, 2) for step in range(100)]


def test_weights_decay_and_nothing_else():
    model = tiny_model(reg_tokens=1)
    model.blocks[0].requires_grad_(False)
    run = _Finetuning(model, model, FinetuneSettings(weight_decay=0.2), None)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.0."):
            assert id(parameter) not in decay
            continue
        small = parameter.ndim <= 1 or name in ("pos_embed", "cls_token", "reg_token")
        assert decay[id(parameter)] == (0 if small else 0.2), name


def test_what_is_frozen_stays():
    model = plain_model()
    model.patch_embed.requires_grad_(False)
    result = finetune(model, schedule_for(model), tiny_batches(), settings(2))
    assert torch.equal(result.model.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert not torch.equal(result.model.head.weight, model.head.weight)


@pytest.mark.parametrize("build", [tiny_model, tiny_caformer])
def test_drop_path_rises_with_depth_and_goes_again(build):
    model = build()
    names = list(model.state_dict())
    blocks = [module for module in model.modules() if hasattr(module, "drop_path1")]
    before = [(block.drop_path1, block.drop_path2) for block in blocks]
    with drop_paths(model, 0.3):
        shares = [getattr(path, "drop_prob", 0.0) for block in blocks for path in (block.drop_path1, block.drop_path2)]
        assert shares[0] == 0
        assert shares[-1] == pytest.approx(0.3)
        assert shares == sorted(shares)
        assert list(model.state_dict()) == names
    assert [(block.drop_path1, block.drop_path2) for block in blocks] == before


def test_drop_path_is_set_in_training_and_not_after():
    model = plain_model(drop_path_rate=0.4)
    schedule, seen = schedule_for(model), []

    def losses(rate):
        result = finetune(model, schedule, tiny_batches(), settings(2, drop_path=rate, lr=0.0, min_lr=0.0))
        seen.append(result.model.blocks[-1].drop_path1.drop_prob)
        return [record.loss for record in result.history.records]

    without = losses(0.0)
    assert losses(0.9) != without
    compressed = compressed_copy(model, schedule)  # in evaluation mode
    expected = [F.cross_entropy(compressed(images), labels).item() for images, labels in tiny_batches()[:2]]
    assert without == pytest.approx(expected, rel=1e-5)
    assert seen == [pytest.approx(0.4)] * 2


def test_distillation_needs_no_labels():
    model = plain_model()
    images = only_images(tiny_batches())
    result = finetune(model, schedule_for(model), images, settings(40, distill=1.0), validation=images)
    losses = [record.loss for record in result.history.records]
    assert sum(losses[-4:]) < sum(losses[:4])  # an epoch is four batches
    assert (result.before.top1, result.before.loss) == (None, None)
    assert result.after.measure == ("agreement", result.after.agreement)
    assert result.gain == result.after.agreement - result.before.agreement


def test_mixed_labels_are_taken_as_they_are():
    model = plain_model()
    hard = tiny_batches()
    soft = [(images, F.one_hot(labels, 5).float()) for images, labels in hard]
    same = [finetune(model, schedule_for(model), batches, settings(2, smoothing=0.1)) for batches in (hard, soft)]
    first, second = ([record.loss for record in result.history.records] for result in same)
    assert first == pytest.approx(second, rel=1e-5)


def test_a_model_without_classes_keeps_its_features():
    model = plain_model(num_classes=0)
    options = settings(30, distill=1.0, lr=0.1)
    result = finetune(model, schedule_for(model), tiny_batches(), options, validation=tiny_batches())
    assert result.history.records[-1].loss < 0.8 * result.history.records[0].loss
    images = torch.cat(only_images(tiny_batches()))
    with torch.no_grad():
        expected = F.cosine_similarity(model(images), result.model(images)).mean()
    assert result.after.cosine == pytest.approx(float(expected), abs=1e-6)
    assert result.gain == result.after.cosine - result.before.cosine > 0
    with pytest.raises(ValueError, match=r"has no classes \(num_classes=0\).*distill=1"):
        finetune(model, schedule_for(model), tiny_batches(), settings())


def test_a_hierarchical_model():
    model = tiny_caformer()
    batches = [(tiny_images(model, 4), torch.arange(4))]
    result = finetune(model, tiny_schedule(model), batches, settings(12, drop_path=0.1, lr=0.05))
    assert result.history.records[-1].loss < result.history.records[0].loss


def test_harm_is_seen():
    model = plain_model()
    images = torch.cat(only_images(tiny_batches(8)))
    with torch.no_grad():
        batches = [(images, model(images).argmax(1))]  # it is right about everything
    result = finetune(model, schedule_for(model, 0.9), batches, settings(4, lr=50.0), validation=batches)
    assert result.gain < 0


def test_what_is_written(tmp_path):
    model = plain_model()
    schedule = schedule_for(model)
    result = finetune(
        model, schedule, tiny_batches(), settings(3), method="evit", validation=tiny_batches(), output=tmp_path
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "schedule.json",
        "history.json",
        "checkpoint.pt",
    }
    fresh = tiny_model(proj_drop_rate=0.0)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    compress(fresh, Schedule.load(tmp_path / "schedule.json"))  # by EViT, as the schedule says
    images = tiny_batches()[0][0]
    with torch.no_grad():
        assert torch.equal(fresh(images), result.model(images))
    history = json.loads((tmp_path / "history.json").read_text())
    assert [record["step"] for record in history["records"]] == [0, 1, 2]
    assert history["after"]["top1"] == result.after.top1
    assert history["before"]["agreement"] == result.before.agreement


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"warmup_steps": 20}, "warmup_steps must be below steps = 20, got 20"),
        ({"lr": -1.0}, "lr must be a finite number"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "min_lr must not be above lr"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ({"smoothing": -0.1}, r"smoothing must lie in \[0, 1\)"),
        ({"distill": 1.5}, r"distill must lie in \[0, 1\], got 1.5"),
        ({"clip": 0}, "clip must be above 0"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_models_that_cannot_be_trained():
    model = plain_model()
    schedule = schedule_for(model)
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        finetune(plain_model().requires_grad_(False), schedule, tiny_batches(), settings(1))
    with pytest.raises(ValueError, match=r"half precision.*amp=True"):
        finetune(plain_model().bfloat16(), schedule, tiny_batches(), settings(1))
    with pytest.raises(ValueError, match="3 blocks"):
        finetune(model, Schedule([65, 40, 30], [65, 30, 20]), tiny_batches(), settings(1))
    with pytest.raises(ValueError, match="checkpoint_every"):
        finetune(model, schedule, tiny_batches(), settings(1), checkpoint_every=0)


def test_images_that_do_not_do(tmp_path):
    model = plain_model()
    schedule = schedule_for(model)
    with pytest.raises(ValueError, match=r"without labels.*distill=1"):
        finetune(model, schedule, only_images(tiny_batches()), settings(1))
    with pytest.raises(ValueError, match="gave no images"):
        finetune(model, schedule, [], settings(1))
    images, labels = tiny_batches()[0]
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 4"):
        finetune(model, schedule, [(images, labels + 5)], settings(1))
    broken = [(images, labels), (images * float("nan"), labels)]
    with pytest.raises(FloatingPointError, match="step 1: the loss or its gradient is not finite"):
        finetune(model, schedule, broken, settings(2), output=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 1
    assert all(tensor.isfinite().all() for tensor in kept["weights"].values())


def test_mixed_precision_trains_float32_weights():
    model = plain_model()
    result = finetune(model, schedule_for(model), tiny_batches(), settings(amp=True))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert result.history.records[-1].loss < 0.9 * result.history.records[0].loss
