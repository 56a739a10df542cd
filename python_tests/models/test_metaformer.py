from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.metaformer import LayerNorm2dNoBias, MetaFormer, Pooling
from tiny_models import tiny_caformer

from diffrate_ext.compression.compress import compress, restore, token_slots
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.schedule import Schedule

NUMBERS = [16, 11, 7, 7, 4, 3]
SCHEDULE = Schedule(None, NUMBERS, prefix=0)


def build(**changes: Any) -> MetaFormer:
    return tiny_caformer(num_classes=7, **changes)


def test_restore_gives_back_the_model_as_it_was() -> None:
    model, images = build(), torch.randn(2, 3, 64, 64)
    before, keys, attributes = model(images), list(model.state_dict()), [dict(vars(m)) for m in model.modules()]
    types = [type(module) for module in model.modules()]
    compress(model, SCHEDULE)
    assert list(model.state_dict()) == keys
    assert not torch.allclose(model(images), before)
    restore(model)
    assert torch.equal(model(images), before)
    assert [type(module) for module in model.modules()] == types
    assert [vars(module) for module in model.modules()] == attributes


def test_a_schedule_that_removes_nothing_changes_nothing() -> None:
    model, images = build(layer_scale_init_values=0.5, drop_path_rate=0.1), torch.randn(2, 3, 64, 64)
    before = model(images)
    compress(model, Schedule(None, [16] * 6, prefix=0))
    torch.testing.assert_close(model(images), before)


def test_each_stage_starts_with_a_full_grid_and_loses_no_token() -> None:
    model = compress(build(), SCHEDULE)
    slots = token_slots(model, torch.randn(3, 3, 64, 64))
    assert [tuple(slot.shape) for slot in slots] == [(3, 16)] * 4 + [(3, 4)] * 2
    for slot, kept in zip(slots, NUMBERS, strict=True):
        for row in slot:
            assert set(row.tolist()) == set(range(kept))


def test_the_most_important_token_takes_no_other_in() -> None:
    model = compress(build(), Schedule(None, [16, 5, 5, 5, 4, 4], prefix=0))
    slots = token_slots(model, torch.randn(8, 3, 64, 64))
    assert ((slots[1] == 0).sum(1) == 1).all()
    assert (slots[1] != 0).sum() == 8 * 15


def test_another_image_size_keeps_the_rates() -> None:
    slots = token_slots(compress(build(), SCHEDULE), torch.randn(1, 3, 128, 128))
    assert [int(slot.max()) + 1 for slot in slots] == [64, 44, 28, 28, 16, 12]


@pytest.mark.parametrize("side", [64, 48, 32, 16])
def test_small_images_keep_as_many_tokens_as_a_block_needs(side: int) -> None:
    """Down to one place in the last stage, which cannot merge with any other."""
    model = compress(build(), Schedule(None, [16, 3, 2, 2, 4, 2], prefix=0, stages=(4, 2)))
    assert model(torch.randn(2, 3, side, side)).shape == (2, 7)
    for slot in token_slots(model, torch.randn(2, 3, side, side)):
        assert int(slot.max()) + 1 >= min(slot.shape[1], 2)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_of_any_size(batch: int) -> None:
    assert compress(build(), SCHEDULE)(torch.randn(batch, 3, 64, 64)).shape == (batch, 7)


def test_gradients_flow_to_every_weight_and_checkpointing_changes_none() -> None:
    images, gradients = torch.randn(2, 3, 64, 64), []
    for checkpointing in (False, True):
        model = build().train()
        model.set_grad_checkpointing(checkpointing)
        compress(model, SCHEDULE)(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_intermediate_features_keep_their_shapes() -> None:
    model, images = build(), torch.randn(2, 3, 64, 64)
    before = model.forward_intermediates(images, intermediates_only=True)
    after = compress(model, SCHEDULE).forward_intermediates(images, intermediates_only=True)
    assert [features.shape for features in after] == [features.shape for features in before]


def test_a_model_of_the_registry() -> None:
    model = timm.create_model("caformer_s18", num_classes=7).eval()
    schedule = uniform_schedule(model, 0.7 * flops(model) / 1e9)
    images = torch.randn(1, 3, 224, 224)
    before = model(images)
    after = compress(model, schedule)(images)
    assert after.shape == before.shape == (1, 7)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("changes", "schedule", "message"),
    [
        ({}, Schedule([16] * 6, NUMBERS, prefix=0), "only merged"),
        ({}, Schedule(None, [16, 2, 2, 2, 2, 2], prefix=1), "1 prefix tokens, the model 0"),
        ({}, Schedule(None, [16] * 5, prefix=0), "5 blocks, the model 6"),
        ({"token_mixers": Pooling, "norm_layers": LayerNorm2dNoBias}, SCHEDULE, "no attention stage"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(build(**changes), schedule)


def test_one_token_is_too_few() -> None:
    with pytest.raises(ValueError, match="keeps 2 tokens or more, the schedule has 1"):
        compress(build(), Schedule([16, 1, 1, 1, 1, 1], [16, 1, 1, 1, 1, 1], prefix=0))
