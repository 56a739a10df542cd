"""Copies that share their weights with the model they come from."""

from __future__ import annotations

import pytest
import torch

from diffrate_ext import embedded
from diffrate_ext.compression import compress, token_slots
from diffrate_ext.schedule import Schedule
from diffrate_ext.sharing import compressed_copy, uncompressed_copy


@pytest.fixture
def model():
    torch.manual_seed(0)
    return embedded.build_model().eval()


@pytest.fixture
def schedule(model):
    return Schedule.uniform(model, 0.2)


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
