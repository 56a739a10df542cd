"""RateSearch and the model it changes: undone, copied, frozen, run in other ways."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from searches import KINDS, build, loss_of, proxies_of, searching
from timm.models.vision_transformer import VisionTransformer
from tiny_models import tiny_images, tiny_vit
from torch import nn

from diffrate_ext import RateSearch, compress, restore, token_slots, uniform_schedule


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_restore_gives_back_the_model_as_it_was(model: nn.Module) -> None:
    images = tiny_images(model)
    before, keys = model(images), list(model.state_dict())
    next(model.parameters()).requires_grad_(False)  # as its owner wanted it
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    attributes, types = [dict(vars(m)) for m in model.modules()], [type(m) for m in model.modules()]
    rates = searching(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(model, types[0])
    rates.train()(images)
    model.eval()
    assert restore(model) is model
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert [type(m) for m in model.modules()] == types
    assert [vars(m) for m in model.modules()] == attributes


def test_weights_train_where_asked(model: nn.Module) -> None:
    first = next(model.parameters()).requires_grad_(False)
    rates = searching(model, train_weights=True).train()
    loss_of(rates(tiny_images(model))).backward()
    assert first.grad is None
    without = [name for name, p in model.named_parameters() if p is not first and p.grad is None]
    assert without == [name for name in without if name.startswith("head_dist")]
    restore(model)
    assert not first.requires_grad


def test_compressing_ends_the_search(model: nn.Module) -> None:
    images, other = tiny_images(model), copy.deepcopy(model)
    rates = searching(model)
    schedule = rates.schedule()
    compress(model, schedule)
    assert all(parameter.requires_grad for parameter in model.parameters())
    compress(other, schedule)
    for training in (False, True):
        assert torch.equal(model.train(training)(images), other.train(training)(images))
    restore(model)
    with pytest.raises(ValueError, match="the model is not compressed"):
        restore(model)


def test_a_search_on_a_compressed_model_begins_anew(model: nn.Module) -> None:
    images = tiny_images(model)
    before = model(images)
    first = searching(model)
    compress(model, first.schedule())
    second = searching(model)
    third = RateSearch(model)
    assert len(third.state_dict()) == len(second.state_dict())
    loss_of(third.train()(images)).backward()
    assert third.merge_logits.grad is not None
    assert second.merge_logits.grad is None
    restore(model.eval())
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_uncompressed_for_a_while(model: nn.Module, training: bool) -> None:
    images = tiny_images(model)
    before, cls = model(images), type(model)
    rates = searching(model).train(training)
    during = rates(images)
    with rates.uncompressed() as plain:
        assert plain is model
        assert type(plain) is cls
        assert not plain.training
        torch.testing.assert_close(plain(images), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), rates.uncompressed():
        raise KeyError
    assert model.training == training
    torch.testing.assert_close(rates(images), during, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(during, before)


def test_weights_and_rates_go_both_ways(model: nn.Module) -> None:
    images, keys, other = tiny_images(model), list(model.state_dict()), copy.deepcopy(model)
    nn.init.ones_(next(other.parameters()))
    rates = searching(model).eval()
    assert list(rates.state_dict()) == [
        *(name for name, _ in rates.named_parameters(recurse=False)),
        *(f"model.{key}" for key in keys),
    ]
    again = RateSearch(other).eval()
    again.load_state_dict(rates.state_dict())
    assert again.schedule() == rates.schedule()
    assert torch.equal(again(images), rates(images))


def pickled(rates: RateSearch) -> RateSearch:
    return pickle.loads(pickle.dumps(rates))


def saved_and_loaded(rates: RateSearch) -> RateSearch:
    file = io.BytesIO()
    torch.save(rates, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
def test_copies(model: nn.Module, copied: Callable[[RateSearch], RateSearch]) -> None:
    images = tiny_images(model)
    before = model(images)
    rates = searching(model)
    other = copied(rates)
    for training in (False, True):
        assert torch.equal(rates.train(training)(images), other.train(training)(images))
    loss_of(other(images)).backward()
    assert rates.merge_logits.grad is None
    assert other.merge_logits.grad is not None
    nn.init.zeros_(other.merge_logits)
    assert other.schedule() != rates.schedule()
    restore(other.model.eval())
    assert torch.equal(other.model(images), before)
    assert all(parameter.requires_grad for parameter in other.model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.allclose(rates.eval()(images), before)


def test_a_copy_of_the_model_alone_searches_by_itself(model: nn.Module) -> None:
    images = tiny_images(model)
    rates = searching(model).train()
    other = copy.deepcopy(model)
    loss_of(other(images)).backward()
    assert rates.merge_logits.grad is None
    nn.init.zeros_(rates.merge_logits)
    assert not torch.equal(model.eval()(images), other.eval()(images))


# --- how it runs


def test_checkpointing_changes_no_gradient(model: nn.Module) -> None:
    gradients = []
    for checkpointing in (False, True):
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        rates = searching(other, train_weights=True).train()
        loss = loss_of(rates(tiny_images(model))) + rates.gflops()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in rates.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_mixed_precision(model: nn.Module) -> None:
    rates = searching(model).train()
    schedule, gflops = rates.schedule(), rates.gflops().item()
    with torch.autocast("cpu", torch.bfloat16):
        logits = rates(tiny_images(model))
        loss = loss_of(logits) + rates.gflops()
        assert rates.schedule() == schedule
        assert rates.gflops().item() == gflops
    loss.backward()
    for logits in proxies_of(rates):
        assert logits.grad is not None
        assert logits.grad.dtype == torch.float32
        assert logits.grad.isfinite().all()
        assert (logits.grad.abs().sum(1) > 0).all()
    assert rates.schedule() == schedule


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "any image size"])  # timm needs an image there
def test_few_images(kind: str, training: bool, count: int) -> None:
    model = build(kind)
    assert searching(model).train(training)(tiny_images(model, count)).shape == (count, 5)


def test_images_do_not_depend_on_each_other(model: nn.Module) -> None:
    rates, images = searching(model).train(), tiny_images(model)
    torch.testing.assert_close(rates(images)[1:2], rates(images[1:2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["class token", "rotary"])
def test_image_sizes(kind: str) -> None:
    """Before a search and after it, but not meanwhile."""
    model: Any = build(kind)
    model.set_input_size((24, 16))
    rates, images = searching(model), torch.randn(2, 3, 24, 16)
    assert rates.schedule().grid == (6, 4)
    loss_of(rates.train()(images)).backward()
    assert rates.prune_logits.grad.abs().sum() > 0
    kept = rates.schedule().after_merging
    assert [int(slot.max()) + 1 for slot in token_slots(model, images)] == list(kept)
    model.set_input_size((24, 24))
    for training in (True, False):
        with pytest.raises(
            ValueError, match="image size changed since this search began, from 25 tokens to 37: restore"
        ):
            rates.train(training)(torch.randn(2, 3, 24, 24))
    restore(model)
    compress(model, uniform_schedule(model, "60%"))
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, 5)


@pytest.mark.parametrize(("kind", "side", "tokens"), [("any image size", 24, (17, 37)), ("CAFormer", 96, (16, 36))])
def test_training_needs_images_of_the_models_size(kind: str, side: int, tokens: tuple[int, int]) -> None:
    images = torch.randn(2, 3, side, side)
    rates = searching(build(kind)).train()
    with pytest.raises(
        ValueError, match=rf"images of the model's own size and no patch dropout: {tokens[0]} tokens, got {tokens[1]}"
    ):
        rates(images)
    assert rates.eval()(images).shape == (2, 5)  # compression scales


def test_the_search_step_has_no_intermediate_features() -> None:
    model: Any = build()
    searching(model).train()
    with pytest.raises(ValueError, match="the search step has no intermediate features"):
        model.forward_intermediates(tiny_images(model))
    model.eval()
    assert len(model.forward_intermediates(tiny_images(model), intermediates_only=True)) == 4


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({}, {"granularity": 0}, ValueError, "granularity must be at least 1, got 0"),
        ({}, {"granularity": -2}, ValueError, "granularity must be at least 1, got -2"),
        ({}, {"granularity": 1.0}, TypeError, "granularity must be an int, got float"),
        ({}, {"granularity": True}, TypeError, "granularity must be an int, got bool"),
        ({}, {"granularity": "1"}, TypeError, "granularity must be an int, got str"),
        ({"depth": 1}, {}, ValueError, "no block to compress"),
        ({"depth": 2, "global_pool": "avg"}, {}, ValueError, "no block to compress"),
        ({"global_pool": "prr"}, {}, ValueError, "global_pool='prr' is not supported"),
        ({}, {"mask_gradient": "slope"}, ValueError, "mask_gradient must be 'difference' or 'derivative', got 'slope'"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    changes: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_vit(**changes)
    with pytest.raises(error, match=message):
        RateSearch(model, **arguments)
    assert type(model) is VisionTransformer
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_no_model_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is not supported"):
        RateSearch(nn.Linear(2, 2))
