"""Rates that are held at a FLOPs target."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from searches import build, proxies_of
from tiny_models import tiny_images
from tiny_search import gflops_of, plain_model, quick, tiny_batches

from diffrate_ext.compression.flops import flops
from diffrate_ext.rate_search.loop import search
from diffrate_ext.rate_search.rates import RateSearch
from diffrate_ext.rate_search.settings import SearchSettings
from diffrate_ext.rate_search.target import along_target, nearest_tilt


@pytest.mark.parametrize("start", ["uniform", "zeros"])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.9])
def test_every_step_is_at_the_target(start: Any, share: float) -> None:
    model, records = plain_model(), []
    settings = SearchSettings(steps=12, lr=0.5, start=start)
    result = quick(model, tiny_batches(), share, settings=settings, report=records.append)
    target = gflops_of(model, share)
    assert [record.cost for record in records] == pytest.approx([target] * 12, rel=0.01)
    assert result.searched == pytest.approx(target, rel=0.005)
    if start == "uniform":  # and yet the rates move
        assert len({(record.after_pruning, record.after_merging) for record in records}) > 3
    assert {record.flops_loss for record in records} == {0.0}


@pytest.mark.parametrize("kind", ["mean pool", "CAFormer"])
def test_other_models(kind: str) -> None:
    model = build(kind)
    target = 0.95 * flops(model) / 1e9
    batches = [(tiny_images(model) + step, torch.arange(3)) for step in range(3)]
    result = search(model, batches, target, SearchSettings(steps=6, lr=0.5))
    one_token = flops(model) / 1e9 / 40
    assert result.searched == pytest.approx(target, abs=one_token)


@pytest.mark.parametrize("mask_gradient", ["difference", "derivative"])
def test_the_first_update(mask_gradient: Any, tmp_path: Any) -> None:
    """Adam gets the gradient of the loss less the FLOPs at the price that leaves a tilt nothing to gain."""
    model, (images, labels) = plain_model(), tiny_batches()[0]
    quick(
        model,
        [(images, labels)],
        settings=SearchSettings(1, lr=0.1, start="uniform", mask_gradient=mask_gradient),
        output=tmp_path,
    )
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    found = torch.stack([state[i]["exp_avg"] for i in range(2)]) / 0.1

    rates = RateSearch(copy.deepcopy(model), mask_gradient=mask_gradient).train()
    rates.set_schedule(_uniform(model))
    rates.project(gflops_of(model, 0.6), 2e-3)
    proxies = proxies_of(rates)
    loss = torch.stack(torch.autograd.grad(F.cross_entropy(rates(images), labels), proxies)).double()
    cost = torch.stack(torch.autograd.grad(rates.gflops(), proxies)).double()
    patches = torch.arange(64.0, 0, -1).double()
    price = (loss * patches).sum() / (cost * patches).sum()
    wanted = loss - price * cost
    order = [0, 1] if rates.prune_logits is next(rates.parameters()) else [1, 0]
    torch.testing.assert_close(found[order].double(), wanted, rtol=1e-3, atol=float(1e-5 * wanted.abs().max()))
    assert (wanted - loss).abs().max() > 0.02 * loss.abs().max()


def _uniform(model: Any) -> Any:
    from diffrate_ext.compression.uniform import uniform_schedule

    return uniform_schedule(model, gflops_of(model, 0.6))


def test_tokens_go_where_they_are_worth_more(monkeypatch: Any) -> None:
    """Where one block's tokens alone count, the others give theirs."""
    model = plain_model()

    class Counting(RateSearch):
        def forward(self, images: Any) -> Any:
            kept = self._kept()[0][1].sum()  # of the second block that has rates
            return super().forward(images) * 0 + torch.stack([kept / 100, -kept / 100, kept * 0, kept * 0, kept * 0])

    monkeypatch.setattr("diffrate_ext.rate_search.loop.RateSearch", Counting)
    images = tiny_batches()[0][0]
    records: list[Any] = []
    settings = SearchSettings(steps=20, lr=0.3)
    quick(model, [(images, torch.zeros(4, dtype=torch.long))], 0.8, settings=settings, report=records.append)
    first, last = records[0].after_merging, records[-1].after_merging
    assert last[2] > first[2] + 2
    assert last[3] < first[3] - 2


def test_along_target() -> None:
    torch.manual_seed(0)
    slopes = [torch.rand(3, 5), torch.rand(3, 5)]
    direction = torch.linspace(1, 0.2, 5)
    gradients = [torch.randn(3, 5), torch.randn(3, 5)]
    found = along_target(gradients, slopes, direction)
    assert sum(float((one * direction).sum()) for one in found) == pytest.approx(0, abs=1e-5)
    differences = [one - other for one, other in zip(found, gradients, strict=True)]
    ratio = differences[0][0, 0] / slopes[0][0, 0]
    for difference, slope in zip(differences, slopes, strict=True):
        torch.testing.assert_close(difference, ratio * slope)
    # nothing is left of a gradient that every block buys at the same price
    for rest in along_target([-3 * slope for slope in slopes], slopes, direction):
        torch.testing.assert_close(rest, torch.zeros(3, 5), rtol=0, atol=1e-5)
    # nor is anything taken where no distribution has a width
    nothing = [torch.zeros(3, 5)] * 2
    for rest in along_target(nothing, nothing, direction):
        assert torch.equal(rest, nothing[0])


def errors_of(tilts: list[float], step: float = 0.0, at: float = 0.0) -> Any:
    """An error that rises through 0 at ``at``, in steps if asked, and notes the tilts that were tried."""

    def error(tilt: float) -> float:
        tilts.append(tilt)
        return math.ceil((tilt - at) / step) * step if step else tilt - at

    return error


@pytest.mark.parametrize("at", [-37.2, -0.3, 0.3, 1.0, 37.2])
def test_the_nearest_tilt(at: float) -> None:
    tilts: list[float] = []
    assert nearest_tilt(errors_of(tilts, at=at), 0.0) == pytest.approx(at, abs=1e-9)
    tilts.clear()
    assert nearest_tilt(errors_of(tilts, at=at), 0.1) == pytest.approx(at, abs=0.1)
    assert len(tilts) < 20
    assert nearest_tilt(errors_of(tilts, at=at), abs(at)) == 0
    stepped = errors_of([], step=0.25, at=at)
    assert stepped(nearest_tilt(stepped, 0.0)) == 0
    apart = errors_of([], at=at)
    jump = nearest_tilt(lambda tilt: apart(tilt) + (1 if tilt > at else -2), 0.1)
    assert jump == pytest.approx(at, abs=1e-6)
    assert jump > at  # the smaller of two errors, on either side


def test_a_target_that_no_tilt_reaches_ends() -> None:
    assert abs(nearest_tilt(lambda tilt: -1.0, 0.0)) < 1e9
    assert abs(nearest_tilt(lambda tilt: 1.0, 0.0)) < 1e9
