"""RateSearch: what the authors' implementation computed, and what holds for every model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load_case
from searches import KINDS, build, loss_of, pools_over_patches, proxies_of, searching
from timm.models.metaformer import MetaFormer
from tiny_models import tiny_images
from torch import Tensor, nn

from diffrate_ext import DivergedError, RateSearch, Schedule, compress, ops, reference
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule

# --- against the authors' numbers


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    assert actual.shape == expected.shape
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("train_weights", [False, True])
@pytest.mark.parametrize("name", ["deit_search_a", "mae_search_a"])
def test_a_search_step_is_the_authors(name: str, train_weights: bool, device: torch.device) -> None:
    case = load_case(name, device)
    arrays, meta = case.arrays, case.meta
    blocks = [index for index in range(meta["cfg"]["depth"]) if arrays[f"prune_logits_{index}"].numel() > 1]
    rates = RateSearch(case.model, meta["granularity"], train_weights, mask_gradient="derivative")
    assert rates.prune_logits is not None
    proxies = {"prune": rates.prune_logits, "merge": rates.merge_logits}
    with torch.no_grad():
        for kind, logits in proxies.items():
            logits.copy_(torch.stack([arrays[f"{kind}_logits_{index}"] for index in blocks]))

    out = rates.train()(case.images)
    gflops = rates.gflops()
    loss_of_classes = F.cross_entropy(out, arrays["labels"].long())
    loss = loss_of_classes + meta["lam"] * (gflops - meta["target"]) ** 2
    loss.backward()

    assert relative(out, arrays["logits"]) < 1e-4
    assert gflops.item() * 1e9 == pytest.approx(meta["flops"], rel=1e-4)
    assert loss_of_classes.item() == pytest.approx(meta["loss_cls"], rel=1e-4)
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-4)
    golden = Schedule(meta["prune"], meta["merge"])
    assert rates.schedule().kept_numbers(rates.n_patches + 1) == golden.kept_numbers(rates.n_patches + 1)
    for kind, logits in proxies.items():
        assert logits.grad is not None
        for row, index in enumerate(blocks):
            expected = arrays[f"{kind}_grad_{index}"]
            assert expected.abs().max() > 0
            assert relative(logits.grad[row], expected) < 1e-3, f"{kind}, block {index}"

    weights = case.model.patch_embed.proj.weight, case.model.blocks[1].attn.qkv.weight  # type: ignore[index,union-attr]
    if train_weights:
        assert relative(weights[0].grad[:8], arrays["grad_patch_proj"]) < 1e-3
        assert relative(weights[1].grad[::24], arrays["grad_qkv_1"]) < 1e-3
    else:
        assert all(parameter.grad is None for parameter in case.model.parameters())


# --- for every kind of model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_the_loss_reaches_every_rate(model: nn.Module) -> None:
    rates = searching(model).train()
    steps = [number for step in rates.schedule().kept_numbers(rates.n_patches + rates.prefix)[:4] for number in step]
    compressing = 2 * rates.merge_logits.shape[0]
    assert len(set(steps)) == compressing + 1 - (rates.prune_logits is None) * compressing // 2  # every number falls
    loss_of(rates(tiny_images(model))).backward()
    for logits in proxies_of(rates):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        # after the last attention nobody looks at what is masked, unless the head does
        matter = len(logits) if pools_over_patches(model) else len(logits) - 1
        assert (logits.grad[:matter].abs().sum(1) > 1e-8).all()
        assert (logits.grad[matter:] == 0).all()
    assert [name for name, parameter in rates.named_parameters() if parameter.grad is not None] == [
        name for name, _ in rates.named_parameters(recurse=False)
    ]


def test_the_reference_operators_take_the_same_step(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, those of the weights too, in float64."""
    rates, images = searching(model.double(), train_weights=True).double().train(), tiny_images(model).double()
    steps = []
    for implementation in (ops, reference):
        for name in ("masked_attention", "compression_rate", "masked_prune_merge"):
            monkeypatch.setattr(ops, name, getattr(implementation, name))
        rates.zero_grad()
        loss = loss_of(rates(images)) + rates.gflops()
        loss.backward()
        steps.append({"loss": loss.detach(), **{name: p.grad for name, p in rates.named_parameters()}})
    for name, expected in steps[1].items():
        torch.testing.assert_close(steps[0][name], expected, msg=lambda message, name=name: f"{name}: {message}")


def test_pruning_in_training_is_pruning_at_inference(model: nn.Module) -> None:
    """Masked tokens are as if dropped. (Merging differs: the paper's two modes count sizes differently.)"""
    rates = searching(model.double(), merging=isinstance(model, MetaFormer)).double()
    images = tiny_images(model).double()
    with torch.no_grad():
        masked, dropped = rates.train()(images), rates.eval()(images)
        with rates.uncompressed() as plain:
            before = plain(images)
    torch.testing.assert_close(masked, dropped, atol=1e-4, rtol=1e-3)
    assert (dropped - before).abs().max() > 1e-2  # something was lost


def test_training_without_gradients_gives_the_same(model: nn.Module) -> None:
    rates, images = searching(model).train(), tiny_images(model)
    with torch.no_grad():
        expected = rates(images)
    torch.testing.assert_close(rates(images).detach(), expected, atol=1e-4, rtol=1e-4)


def test_evaluation_is_compression_at_the_current_rates(model: nn.Module) -> None:
    images, other = tiny_images(model), copy.deepcopy(model)
    plain = model(images)
    rates = searching(model).eval()
    out = rates(images)
    torch.testing.assert_close(out, compress(other, rates.schedule())(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, model(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, plain)
    for logits in proxies_of(rates):
        nn.init.zeros_(logits)
    torch.testing.assert_close(rates(images), compress(other, rates.schedule())(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", [1, 3, 5, 16, 40])
def test_gflops_are_those_of_the_schedule(model: nn.Module, granularity: int) -> None:
    rates = RateSearch(model, granularity)
    random = torch.Generator().manual_seed(granularity)
    for _ in range(5):
        for logits in proxies_of(rates):
            logits.data = 3 * torch.randn(logits.shape, generator=random)
        gflops = rates.gflops()
        assert gflops.item() == pytest.approx(flops(model, rates.schedule()) / 1e9, rel=1e-6)
        assert gflops.dtype == torch.float32
    for gradient in torch.autograd.grad(gflops, proxies_of(rates)):
        assert gradient.isfinite().all()
        assert (gradient.abs().sum() > 0) == (granularity < 16)  # one candidate leaves no choice
    assert rates.schedule().model == uniform_schedule(model, flops(model) / 1e9).model


def test_every_rate_pays_for_its_tokens(model: nn.Module) -> None:
    """The gradient of the FLOPs goes to the kept numbers of a block alike, also where another one is smaller."""
    rates = searching(model)
    gradients = torch.autograd.grad(rates.gflops(), proxies_of(rates))
    for logits, gradient in zip(proxies_of(rates), gradients, strict=True):
        p = logits.softmax(-1).detach()
        candidates = torch.arange(rates.n_patches, 0, -1.0)
        mean = (p * candidates).sum(-1, keepdim=True)
        per_token = gradient / (p * (candidates - mean))  # d kept / d logits, without the rounding
        torch.testing.assert_close(per_token, per_token[:, :1].expand_as(per_token), rtol=1e-3, atol=0)
        assert (per_token > 0).all()
    if len(gradients) == 2:
        prune, merge = (
            (gradient[:, 0] / (logits.softmax(-1)[:, 0] * (16 - (logits.softmax(-1) * candidates).sum(-1))))
            for logits, gradient in zip(proxies_of(rates), gradients, strict=True)
        )
        torch.testing.assert_close(prune, merge, rtol=1e-3, atol=0)


def test_a_search_for_flops_alone_finds_them(model: nn.Module) -> None:
    rates = RateSearch(model)
    low, high = rates.reachable()
    target = low + 0.6 * (high - low)
    optimizer = torch.optim.Adam(proxies_of(rates), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        ((rates.gflops() - target) / high).square().backward()
        optimizer.step()
    assert abs(rates.gflops().item() - target) < 0.06 * high


def test_projection_meets_the_target(model: nn.Module) -> None:
    rates = searching(model)
    low, high = rates.reachable()
    assert high == pytest.approx(flops(model) / 1e9)
    one_token = (high - low) / rates.n_patches  # more than a token more in one block costs
    for part in (0.0, 0.1, 0.5, 0.9, 1.0):
        target = low + part * (high - low)
        rates.project(target)
        assert flops(model, rates.schedule()) / 1e9 == pytest.approx(target, abs=one_token)
    for target in (0.99 * low, 1.01 * high):
        with pytest.raises(ValueError, match="GFLOPs cannot be reached"):
            rates.project(target)
    rates.project(f"{50 * (low + high) / high:g}%")
    assert flops(model, rates.schedule()) / 1e9 == pytest.approx((low + high) / 2, abs=one_token)


def test_a_schedule_to_search_from(model: nn.Module) -> None:
    schedule = uniform_schedule(model, 0.85 * flops(model) / 1e9)
    rates = RateSearch(model)
    rates.set_schedule(schedule)
    # a proxy that keeps as many as another, or all, has no say in the running minimum
    assert rates.schedule().after_merging[:4] == schedule.after_merging[:4]
    assert flops(model, rates.schedule()) / 1e9 == pytest.approx(flops(model, schedule) / 1e9)
    keep_all = Schedule(None, [rates.prefix + 16] * len(schedule), prefix=rates.prefix)
    if not isinstance(model, MetaFormer):
        rates.set_schedule(keep_all)
        assert set(rates.schedule().after_merging) == {rates.prefix + 16}
    with pytest.raises(ValueError, match="blocks, the model"):
        rates.set_schedule(Schedule(None, [9] * 9, prefix=rates.prefix))


@pytest.mark.parametrize("granularity", [2, 7])
def test_granularity_leaves_fewer_candidates(granularity: int) -> None:
    rates = searching(build(), granularity=granularity)
    candidates = list(range(16, 0, -granularity))
    assert rates.merge_logits.shape == (3, len(candidates))
    for logits in proxies_of(rates):
        nn.init.constant_(logits, -1e4)
        logits.data[:, 1] = 0
    assert list(rates.schedule().after_merging) == [17, *[candidates[1] + 1] * 3]
    loss_of(rates.train()(tiny_images(rates.model))).backward()


def test_which_blocks_have_rates(model: nn.Module) -> None:
    rates = RateSearch(model)
    assert rates.merge_logits.shape == (2 if pools_over_patches(model) else 3, 16)
    assert (rates.prune_logits is None) == isinstance(model, MetaFormer)
    assert all(torch.equal(logits, torch.zeros_like(logits)) for logits in proxies_of(rates))
    schedule, tokens = rates.schedule(), rates.prefix + 16
    assert schedule.after_merging[0] == tokens
    assert schedule.after_merging[1] == rates.prefix + 9  # the mean of 1 .. 16, rounded up
    assert schedule.prefix == rates.prefix
    assert schedule.grid == (4, 4)


def test_something_is_left_to_merge_into(model: nn.Module) -> None:
    """A CAFormer block takes two tokens: the first one takes no other in."""
    rates = RateSearch(model)
    for logits in proxies_of(rates):
        nn.init.constant_(logits, -1e4)
        logits.data[:, -1] = 0
    fewest = max(rates.prefix + 1, 2 if isinstance(model, MetaFormer) else 1)
    assert set(rates.schedule().after_merging[1:3]) == {fewest}
    images = tiny_images(model)
    assert rates.train()(images).isfinite().all()
    assert rates.eval()(images).isfinite().all()


def test_gflops_follow_the_model() -> None:
    """A head that comes during the search costs what it costs."""
    model: Any = build()
    rates = searching(model)
    before = rates.gflops().item()
    model.reset_classifier(1000)
    assert rates.gflops().item() * 1e9 == pytest.approx(before * 1e9 + 16 * 995, rel=1e-6)
    assert rates.gflops().item() == pytest.approx(flops(model, rates.schedule()) / 1e9, rel=1e-6)
    assert rates.reachable()[1] == pytest.approx(flops(model) / 1e9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rates_that_are_no_numbers_say_that_the_search_diverged(model: nn.Module, value: float) -> None:
    rates = searching(model)
    with torch.no_grad():
        rates.merge_logits[0] = value
    for training in (False, True):
        with pytest.raises(DivergedError, match="the search diverged: the logits of the rates hold NaN or infinity"):
            rates.train(training)(tiny_images(model))
    for call in (rates.schedule, lambda: rates.project(rates.reachable()[1])):
        with pytest.raises(DivergedError, match="the search diverged"):
            call()


def test_what_a_masked_token_is_worth(model: nn.Module) -> None:
    """Two gradients of one loss."""
    for name, parameter in model.named_parameters():
        if "qkv.weight" in name:
            nn.init.normal_(parameter, std=1.0)
    found = []
    for kind in ("difference", "derivative"):
        rates = searching(copy.deepcopy(model), mask_gradient=kind).train()
        loss = loss_of(rates(tiny_images(model)))
        found.append((loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, proxies_of(rates))])))
    (loss, difference), (same, derivative) = found
    assert loss == same
    assert difference.abs().max() > 0
    assert (derivative - difference).abs().max() > 0.01 * difference.abs().max()


def test_flops_losses(model: nn.Module) -> None:
    rates, target = searching(model), 0.001
    missing = rates.gflops().item() - target
    uncompressed = flops(model) / 1e9
    assert rates.flops_loss(target).item() == pytest.approx(106 * (missing / uncompressed) ** 2, rel=1e-4)
    assert rates.flops_loss(target, weight=1.0).item() == pytest.approx(21.2 * (missing / uncompressed) ** 2, rel=1e-4)
    assert rates.flops_loss(target, kind="absolute").item() == pytest.approx(5 * missing**2, rel=1e-4)
    for gradient in torch.autograd.grad(rates.flops_loss(target), proxies_of(rates)):
        assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("half_pruned", [False, True])
def test_a_schedule_that_only_merges_turns_pruning_off(half_pruned: bool) -> None:
    """Neither updates nor the way back to the target bring it back; merging moves."""
    model = build()
    schedule = uniform_schedule(model, 0.85 * flops(model) / 1e9)
    entering = (17, *schedule.after_merging[:-1])
    if not half_pruned:
        schedule = replace(schedule, after_pruning=entering)
    rates = RateSearch(model).train()
    rates.set_schedule(schedule)
    before = rates.schedule().after_merging
    optimizer = torch.optim.AdamW([p for p in rates.parameters() if p.requires_grad], lr=0.3, weight_decay=0)
    for _ in range(30):
        optimizer.zero_grad()
        (rates(tiny_images(model)).square().sum() + 1e3 * rates.gflops()).backward()
        optimizer.step()
    rates.project(0.8 * flops(model) / 1e9)
    found = rates.schedule()
    assert found.after_merging != before
    assert (found.after_pruning != (17, *found.after_merging[:-1])) == half_pruned
