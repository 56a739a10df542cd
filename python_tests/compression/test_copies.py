"""Copies that share their weights with the model they come from."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from diffrate_ext import embedded
from diffrate_ext.compression.compress import compress, restore, token_slots
from diffrate_ext.compression.copies import compressed_copy, uncompressed_copy
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.rate_search.rates import RateSearch
from diffrate_ext.timing import benchmark
from diffrate_ext.visualization import visualize


@pytest.fixture
def model():
    torch.manual_seed(0)
    return embedded.build_model().eval()


@pytest.fixture
def schedule(model):
    return uniform_schedule(model, 0.2)


def test_the_model_stays_as_it_is(model, schedule):
    images = torch.randn(2, 1, 28, 28)
    before = model(images)
    compressed = compressed_copy(model, schedule)
    assert torch.equal(model(images), before)
    assert not torch.equal(compressed(images), before)
    with pytest.raises(ValueError, match="not compressed"):
        token_slots(model, images)


def test_weights_are_shared(model, schedule):
    compressed = compressed_copy(model, schedule)
    own, shared = dict(model.named_parameters()), dict(compressed.named_parameters())
    assert own.keys() == shared.keys()
    assert all(shared[name] is parameter for name, parameter in own.items())
    assert not {id(module) for module in model.modules()} & {id(module) for module in compressed.modules()}


def test_uncompressed_copy(model, schedule):
    images = torch.randn(2, 1, 28, 28)
    before = model(images)
    assert torch.equal(uncompressed_copy(model)(images), before)
    compress(model, schedule)
    after = model(images)
    assert torch.equal(uncompressed_copy(model)(images), before)
    assert torch.equal(model(images), after)


@pytest.mark.parametrize("training", [False, True])
def test_copies_of_a_model_that_is_searched_leave_its_weights_frozen(model, schedule, training):
    images = torch.randn(2, 1, 28, 28)
    before = model(images)
    rates = RateSearch(model).train(training)
    rates.set_schedule(schedule)
    during = rates(images)
    plain, compressed = uncompressed_copy(model), compressed_copy(model, schedule)
    benchmark(model, schedule, images=images, rounds=1, warmup=0)
    visualize(model, images, schedule)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, p in rates.named_parameters() if p.requires_grad] == ["merge_logits", "prune_logits"]
    assert torch.equal(plain.eval()(images), before)
    assert not torch.equal(compressed.eval()(images), before)
    assert torch.equal(rates(images), during)
    assert type(plain) is VisionTransformer
    restore(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
