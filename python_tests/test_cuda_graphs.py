"""Nothing waits for the host: operators, compressed models and search steps can be captured in a CUDA graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load_case
from samples import SAMPLES, Sample, tensors
from torch import Tensor

from diffrate_ext import RateSearch, compress

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
