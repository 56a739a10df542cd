"""Searches for other methods than DiffRate by default: its options, and ToMe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from searches import KINDS, build, loss_of, pools_over_patches, proxies_of, searching
from timm.models.metaformer import MetaFormer
from tiny_models import tiny_caformer, tiny_images, tiny_vit
from tiny_search import gflops_of, plain_model, tiny_batches
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from diffrate_ext import InputValueError, RateSearch, Schedule, SearchSettings, compress, reference, search
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.methods import Method, ToMe, method_of
from diffrate_ext.methods.masking import BlockRates
from diffrate_ext.methods.tome_search import merge_by_keys
from diffrate_ext.models.adapter import TokenRules
from diffrate_ext.models.compressed import TokenState
from diffrate_ext.models.transformer_adapter import TransformerAdapter

OPTIONS = [
    "match=keys",
    "operations=merge_prune",
    "match=keys,operations=merge_prune",
    "operations=prune",
    "operations=merge",
    "importance=received",
    "importance=value_norm",
    "match=keys,operations=merge_prune,importance=value_norm",
    "match=keys,importance=random",
]
BY_ALL_METHODS = ["class token", "registers", "mean pool", "rotary", "rotary by block and head"]
METHODS = [*(f"diffrate:{options}" for options in OPTIONS), "tome", "tome:proportional_attention=false"]


@pytest.fixture
def plain_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes add up as they are: of cosines, the paper's two modes keep different books."""
    own = TransformerAdapter.rules.fget
    assert own is not None
    monkeypatch.setattr(TransformerAdapter, "rules", property(lambda self: replace(own(self), size_rule="sum")))


def assert_masked_is_dropped(model: nn.Module, method: str) -> None:
    rates = searching(model.double(), method=method).double()
    images = tiny_images(model).double()
    with torch.no_grad():
        masked, dropped = rates.train()(images), rates.eval()(images)
        with rates.uncompressed() as plain:
            before = plain(images)
    torch.testing.assert_close(masked, dropped, atol=1e-4, rtol=1e-3)
    assert (dropped - before).abs().max() > 1e-2  # something was lost


@pytest.mark.parametrize("kind", BY_ALL_METHODS)
@pytest.mark.parametrize("method", METHODS)
def test_masking_is_dropping(method: str, kind: str, plain_sizes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    if "random" in method:  # the same for whatever is alive: the last come first

        def rising(images: int, patches: int, device: Any = None) -> Tensor:
            return torch.arange(patches, dtype=torch.float64).expand(images, -1)

        monkeypatch.setattr(torch, "rand", rising)
    assert_masked_is_dropped(model, method)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BY_ALL_METHODS])
def test_masking_is_dropping_by_tome(kind: str) -> None:
    assert_masked_is_dropped(build(kind), "tome")


@pytest.mark.parametrize("options", ["match=keys", "operations=merge", "match=keys,operations=merge_prune"])
def test_masking_is_dropping_in_caformer(options: str) -> None:
    assert_masked_is_dropped(tiny_caformer(), f"diffrate:{options}")


@pytest.mark.parametrize("kind", ["class token", "mean pool", "CAFormer"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_reaches_every_rate(method: str, kind: str) -> None:
    if kind == "CAFormer" and ("prune" in method or "value_norm" in method):
        pytest.skip("CAFormer is only merged, and has no class token")
    model = build(kind)
    rates = searching(model, method=method).train()
    loss_of(rates(tiny_images(model))).backward()
    for logits in proxies_of(rates):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        matter = len(logits) if pools_over_patches(model) else len(logits) - 1
        assert (logits.grad[:matter].abs().sum(1) > 1e-8).all()
    (gradient, *_) = torch.autograd.grad(rates.gflops(), proxies_of(rates))
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", ["class token", "mean pool", "CAFormer"])
@pytest.mark.parametrize("method", METHODS)
def test_schedules_gflops_and_targets(method: str, kind: str) -> None:
    """Whatever the rates are, the schedule is one that the method can run, and all numbers are of this schedule."""
    if kind == "CAFormer" and ("=prune" in method or "value_norm" in method):
        pytest.skip("CAFormer is only merged, and has no class token")
    model, random = build(kind), torch.Generator().manual_seed(3)
    images = tiny_images(model)
    rates = RateSearch(model, method=method)
    low, high = rates.reachable()
    for spread in (0.0, 0.2, 2.0, 20.0, 200.0):
        for logits in proxies_of(rates):
            logits.data = spread * torch.randn(logits.shape, generator=random)
        schedule = rates.schedule()
        assert schedule.method == method
        assert rates.gflops().item() == pytest.approx(flops(model, schedule) / 1e9, rel=1e-6)
        assert low * (1 - 1e-6) <= flops(model, schedule) / 1e9 <= high * (1 + 1e-6)
        with torch.no_grad():  # refuses what the method cannot run
            compress(build(kind), schedule)(images)
    for part in (0.0, 0.3, 0.7, 1.0):
        target = low + part * (high - low)
        rates.project(target)
        assert flops(model, rates.schedule()) / 1e9 == pytest.approx(target, abs=(high - low) / rates.n_patches)
    with pytest.raises(InputValueError, match="cannot be reached"):
        rates.project(0.99 * low)


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_to_search_from(method: str) -> None:
    model = tiny_vit()
    schedule = uniform_schedule(model, 0.8 * flops(model) / 1e9, method=method)
    rates = RateSearch(model, method=method)
    rates.set_schedule(schedule)
    assert rates.schedule().method == method
    assert rates.schedule().after_merging == schedule.after_merging
    if method == "diffrate:operations=prune":
        assert rates.schedule().after_pruning == schedule.after_merging
    else:
        assert (rates.schedule().after_pruning is None) == (schedule.after_pruning is None)
    if schedule.after_pruning is not None:
        assert rates.schedule().after_pruning == schedule.after_pruning


def test_merging_first_counts_as_its_schedule_does() -> None:
    rates = RateSearch(tiny_vit(), method="diffrate:operations=merge_prune")
    schedule = Schedule([17, 14, 10, 7], [17, 11, 8, 7])
    rates.set_schedule(schedule)
    found = rates.schedule()
    assert (found.after_pruning, found.after_merging) == (schedule.after_pruning, schedule.after_merging)
    kept = rates._kept()[0].detach().round()  # pruning has the last word
    assert kept[:, 0].tolist() == [11, 8, 7]
    assert kept[:, 1].tolist() == [14, 9, 8]


# --- ToMe's step


@given(st.integers(0, 3), st.integers(0, 2**31 - 1), st.data())
def test_merging_among_those_that_are_alive(prefix: int, seed: int, data: Any) -> None:
    """As inference merges them without the others, which stay where they are."""
    tokens = data.draw(st.integers(prefix + 1, 17))
    alive = data.draw(st.integers(prefix + 1, tokens))
    merged = data.draw(st.integers(0, (alive - prefix) // 2))
    keys = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    removal, place, slot = merge_by_keys(keys, torch.tensor(alive), torch.tensor(alive - merged), prefix)
    expected = reference.bipartite_match(keys[:, :alive], merged, prefix=prefix)
    assert torch.equal(slot[:, :alive], expected)
    more = reference.bipartite_match(keys[:, :alive], (alive - prefix) // 2, prefix=prefix)
    for image in range(2):
        assert sorted(place[image].tolist()) == list(range(tokens))
        assert sorted(removal[image].tolist()) == list(range(tokens))
        assert place[image, alive:].tolist() == removal[image, alive:].tolist() == list(range(alive, tokens))
        assert slot[image, alive:].tolist() == list(range(alive, tokens))
        goes = removal[image, :alive] >= alive - merged
        assert int(goes.sum()) == merged
        assert torch.equal(place[image, :alive][goes], removal[image, :alive][goes])
        assert torch.equal(place[image, :alive][~goes], slot[image, :alive][~goes])
        # whoever goes now also goes when more merge, and of those the most similar one stands last
        assert all((more[image] == more[image, token]).sum() > 1 for token in goes.nonzero().flatten())
        unit = torch.nn.functional.normalize(keys[image, :alive], dim=-1)
        odd = [token for token in range(prefix, alive) if token % 2]
        even = [token for token in range(prefix, alive) if token % 2 == 0]
        if odd:
            best = {token: float((unit[odd] @ unit[token]).max()) for token in even}
            by_removal = sorted(even, key=lambda token: int(removal[image, token]))
            assert by_removal == sorted(even, key=lambda token: best[token])
            assert [int(removal[image, token]) for token in by_removal] == list(range(alive - len(even), alive))


def test_the_gradient_of_a_mask_is_that_of_its_place_in_the_order_of_removal() -> None:
    tokens, alive, kept = 11, 9, 7
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mask = torch.ones(2, tokens, dtype=torch.float64)
    mask[:, alive:] = 0
    mask.requires_grad_()
    prob = torch.rand(tokens, dtype=torch.float64).requires_grad_()
    rates = BlockRates(torch.ones_like(prob), prob, prob.new_tensor(tokens), prob.new_tensor(kept))
    size = 1 + normal(2, tokens).abs()
    step = ToMe().search_step(TokenRules(1, "class"), rates, TokenState(size, mask))
    keys, x = normal(2, 2, tokens, 4), normal(2, tokens, 6)
    step.attend(normal(2, 2, tokens, 4), keys, normal(2, 2, tokens, 4), 0.5)
    out = step.reduce(x, torch.zeros_like(x))
    removal, place, slot = merge_by_keys(keys.mean(1), torch.tensor(alive), torch.tensor(kept), 1)
    state = step.after
    assert state.mask is not None
    assert state.size is not None
    assert state.mask.tolist() == [[1.0] * kept + [0.0] * (tokens - kept)] * 2
    weights = normal(2, tokens)
    of_mask, of_prob = torch.autograd.grad((state.mask * weights).sum(), [mask, prob])
    expected = torch.zeros(tokens, dtype=torch.float64)
    for image in range(2):
        for token in range(tokens):
            weight = weights[image, place[image, token]]
            j = int(removal[image, token])
            if token < alive:  # what was masked before has no say in this block's rates, nor they in it
                expected[j] += weight
            assert of_mask[image, token] == (0.0 if kept <= j < alive else weight)
            together = (slot[image] == slot[image, token]).nonzero().flatten()
            part = size[image, together, None]
            target = int(slot[image, token])
            mean = (x[image, together] * part).sum(0) / part.sum()
            torch.testing.assert_close(out[image, target], mean)
            torch.testing.assert_close(state.size[image, target], part.sum())
            if kept <= place[image, token]:  # masked, not lost
                assert torch.equal(out[image, place[image, token]], x[image, token])
                assert state.size[image, place[image, token]] == size[image, token]
    torch.testing.assert_close(of_prob, expected)

    step.rates = replace(rates, kept_m=prob.new_tensor(alive))  # type: ignore[attr-defined]
    step.reduce(x, torch.zeros_like(x))
    assert step.after.mask is not None
    assert torch.autograd.grad(step.after.mask.sum(), prob, allow_unused=True)[0].abs().sum() == 0


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA cannot copy a fake tensor there")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_reads_nothing_on_the_host(method: str, masked: bool) -> None:
    """A CUDA graph could not hold it. Of fake tensors there is nothing to read."""
    with FakeTensorMode(), torch.device("cuda"):
        prob, number = torch.ones(17), torch.ones(())
        state = TokenState(torch.ones(2, 17), torch.ones(2, 17)) if masked else TokenState()
        rates = BlockRates(prob, prob, number, number)
        step = method_of(method).search_step(TokenRules(1, "class"), rates, state)
        q = torch.ones(2, 2, 17, 4)
        step.attend(q, q, q, 0.5)
        assert step.reduce(torch.ones(2, 17, 6), torch.ones(2, 17, 6)).shape == (2, 17, 6)


def test_few_images() -> None:
    model = tiny_vit()
    rates = searching(model, method="tome").train()
    for count in (0, 1):
        assert rates(tiny_images(model, count)).shape == (count, 5)


# --- searches


class Unsearchable(Method):
    name = "mine"

    def step(self, rules: Any, k_p: int, k_m: int, before: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize("method", ["evit", "random", Unsearchable()])
def test_what_cannot_be_searched(method: str | Method) -> None:
    model = tiny_vit()
    with pytest.raises(InputValueError, match=f"method '{method}' has no rates to learn: .* diffrate and tome"):
        RateSearch(model, method=method)
    assert type(model) is type(tiny_vit())


@pytest.mark.parametrize("options", ["operations=prune", "importance=value_norm"])
def test_what_a_model_cannot_do(options: str) -> None:
    with pytest.raises(InputValueError, match="MetaFormer"):
        RateSearch(tiny_caformer(), method=f"diffrate:{options}")


@pytest.mark.parametrize("method", ["tome", "diffrate:operations=prune", "diffrate:match=keys,operations=merge_prune"])
def test_a_search_says_what_it_is_for_and_resumes(method: str, tmp_path: Path) -> None:
    model, batches = plain_model(), tiny_batches(6)
    settings = SearchSettings(steps=6, lr=0.3, method=method)
    target = gflops_of(model, 0.7)

    def stop(record: Any) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    whole = search(model, batches, target, settings, validation=tiny_batches(1))
    with pytest.raises(KeyboardInterrupt):
        search(model, batches, target, settings, output=tmp_path, report=stop)
    resumed = search(model, batches, target, settings, output=tmp_path, resume=True)
    assert resumed.steps_before == 4
    assert resumed.schedule == whole.schedule
    assert resumed.history.records == whole.history.records
    assert whole.schedule.method == Schedule.load(tmp_path / "schedule.json").method == method
    assert whole.gflops == pytest.approx(target, rel=0.01)
    with pytest.raises(InputValueError, match=f"method: '{method}' then, 'diffrate' now"):
        search(model, batches, target, replace(settings, method="diffrate"), output=tmp_path, resume=True)


def test_settings_take_a_method_and_refuse_what_is_none() -> None:
    assert SearchSettings(method=ToMe()).fingerprint()["method"] == "tome"
    with pytest.raises(InputValueError, match="method must be one of"):
        SearchSettings(method="tme")


@pytest.mark.parametrize("kind", ["class token", "CAFormer"])
def test_tome_has_rates_in_the_first_block(kind: str) -> None:
    model = build(kind)
    rates = RateSearch(model, method="tome")
    assert rates.prune_logits is None
    assert rates.merge_logits is not None
    assert len(rates.merge_logits) == 4 - isinstance(model, MetaFormer)
    nn.init.constant_(rates.merge_logits, -1e4)
    rates.merge_logits.data[:, -1] = 0  # one patch: at most half of them go in a block
    assert rates.schedule().after_merging[: len(rates.merge_logits)] == (
        (8, 4, 2) if isinstance(model, MetaFormer) else (9, 5, 3, 2)
    )


@pytest.mark.parametrize("method", ["tome", "diffrate:match=keys,operations=merge_prune,importance=value_norm"])
def test_checkpointing_changes_no_gradient_and_autocast_no_rates(method: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_vit()
        model.set_grad_checkpointing(checkpointing)
        rates = searching(model, method=method, train_weights=True).train()
        loss_of(rates(tiny_images(model))).backward()
        gradients.append({name: parameter.grad for name, parameter in rates.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    schedule = rates.schedule()
    rates.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(rates(tiny_images(rates.model)))
        assert rates.schedule() == schedule
    loss.backward()
    for logits in proxies_of(rates):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad[:-1].abs().sum(1) > 0).all()
