"""Nothing waits for the host: operators, compressed models and search steps can be captured in a CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load_case
from samples import SAMPLES, Sample, tensors
from tiny_search import tiny_batches, tiny_model
from torch import Tensor, nn

from diffrate_ext import RateSearch, SearchSettings, compress, search
from diffrate_ext.compression.flops import flops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from harness import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


def check_replay(call: Callable[[], Any], inputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """A graph of a call that reads ``inputs`` gives what the call gives, also once ``others`` stand in their place."""
    replay, reason = captured(call)
    assert replay is not None, reason
    for replacements in (others, [tensor.clone() for tensor in inputs]):
        for place, replacement in zip(inputs, replacements, strict=True):
            place.data.copy_(replacement)
        expected = [result.clone() for result in tensors(call())]
        actual = tensors(replay())
        assert actual
        for result, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(result, wanted, equal_nan=True)


@pytest.mark.parametrize("sample", [pytest.param(sample, id=name) for name, sample in SAMPLES.items()])
def test_operators(sample: Sample) -> None:
    inputs = [tensor.to(GPU) for tensor in sample.inputs(3)]
    for tensor in inputs[: sample.differentiable]:
        tensor.requires_grad_()
    others = [tensor.detach().flip(0) if tensor.ndim > 1 else tensor.detach() for tensor in inputs]

    def call() -> tuple[Tensor, ...]:
        results = tensors(sample.function(*inputs))
        smooth = [result for result in results if result.requires_grad]
        gradients: tuple[Tensor, ...] = ()
        if smooth:
            weights = [torch.ones_like(result) for result in smooth]
            found = torch.autograd.grad(smooth, inputs[: sample.differentiable], weights, allow_unused=True)
            gradients = tuple(gradient for gradient in found if gradient is not None)
        return *(result.detach() for result in results), *gradients

    check_replay(call, inputs, others)


@pytest.mark.parametrize("name", ["deit_eval_a", "mae_eval_a", "caformer_eval_a"])
def test_a_compressed_model(name: str) -> None:
    case = load_case(name, GPU)
    compress(case.model, case.schedule)
    with torch.inference_mode():
        check_replay(lambda: case.model(case.images), [case.images], [case.images.flip(0)])


def reduce_overhead(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(model, mode="reduce-overhead")
    return lambda images: compiled(images).clone()  # the next call overwrites what it returned


def graphed_callable(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.cuda.make_graphed_callables(lambda images: model(images), (images.clone(),))


@pytest.mark.parametrize("ways", [reduce_overhead, graphed_callable])
def test_ways_to_replay_a_compressed_model(ways: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]) -> None:
    """Those of docs/cuda_graphs.md; the third is ``test_a_compressed_model``."""
    case = load_case("deit_eval_a", GPU)
    compress(case.model, case.schedule)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        fast = ways(case.model, case.images)
        for step in range(5):  # torch.compile warms up, records, and then replays
            images = case.images.roll(step, 0)
            torch.testing.assert_close(fast(images), case.model(images), rtol=1e-3, atol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("name", ["deit_search_a", "mae_search_a"])
def test_a_search_step(name: str) -> None:
    case = load_case(name, GPU)
    rates = RateSearch(case.model, case.meta["granularity"]).train()
    labels = case.arrays["labels"].long()
    proxies = [logits for logits in (rates.prune_logits, rates.merge_logits) if logits is not None]

    def step() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(rates(case.images), labels) + rates.gflops() ** 2
        return loss.detach(), *torch.autograd.grad(loss, proxies)

    # kept numbers change with the logits, and the graph must see that on the device
    sharper = [torch.linspace(-3, 3, logits.shape[1], device=GPU).expand_as(logits).contiguous() for logits in proxies]
    check_replay(step, [case.images, *proxies], [case.images.flip(0), *sharper])


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("soft_targets", [False, True])
def test_a_search(amp: bool, soft_targets: bool) -> None:
    """With dropout and drop path, whose random numbers must be the same, and with a smaller batch in between."""
    model = tiny_model(proj_drop_rate=0.3, drop_path_rate=0.3).to(GPU)
    model.head.weight.data *= 50  # dropout then shows in the loss
    batches = tiny_batches(6)
    batches[3] = (batches[3][0][:2], batches[3][1][:2])
    target = 0.6 * flops(model) / 1e9
    settings = SearchSettings(
        steps=12, lr=0.1, flops_loss="relative", warmup_steps=2, soft_targets=soft_targets, amp=amp
    )
    eager = search(model, batches, target, settings).history.records
    replayed = search(model, batches, target, replace(settings, cuda_graph=True)).history.records
    other = search(model, batches, target, replace(settings, seed=1)).history.records
    bound = 1e-2 if amp else 1e-3
    for there, here in zip(replayed, eager, strict=True):
        assert there.loss == pytest.approx(here.loss, rel=bound)
        assert there.flops_loss == pytest.approx(here.flops_loss, rel=10 * bound, abs=1e-3)
        assert there.cost == pytest.approx(here.cost, rel=bound)
    # what the bound can tell apart: other random numbers
    assert max(abs(one.loss / here.loss - 1) for one, here in zip(other, eager, strict=True)) > 2 * bound
