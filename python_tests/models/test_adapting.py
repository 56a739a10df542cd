"""Compressed models with low-rank adapters and with quantised weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from diffrate_ext import Schedule, compress, flops, restore, uniform_schedule


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def schedule_for(model: nn.Module) -> Schedule:
    return uniform_schedule(model, "70%")


@pytest.mark.parametrize("adapters_first", [False, True])
def test_low_rank_adapters(model: Any, adapters_first: bool) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    schedule = schedule_for(model)
    before, plain = flops(model, schedule), compress(copy.deepcopy(model), schedule)(images())
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=True)
    if not adapters_first:
        compress(model, schedule)
    adapted = peft.get_peft_model(model, config)
    if adapters_first:
        compress(adapted.base_model.model, schedule)
    assert torch.equal(adapted(images()), plain)  # adapters begin at zero
    # each of a layer's two matrices, on the tokens that come to it
    tokens = [17, *schedule.after_merging]
    added = sum(4 * (192 + 576) * n + 4 * (192 + 768) * left for n, left in itertools.pairwise(tokens))
    assert flops(adapted.base_model.model, schedule) == before + added

    adapted.train()
    adapted(images()).square().sum().backward()
    trained = {name for name, weights in adapted.named_parameters() if weights.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.02)
    adapted.eval()
    expected = adapted(images())
    assert not torch.allclose(expected, plain)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(images()), expected, atol=1e-4, rtol=1e-3)
    assert flops(restore(merged), schedule) == before


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("quantised_first", [False, True])
def test_quantised_weights(model: Any, config: str, quantised_first: bool) -> None:
    """A product with quantised weights is one with the weights that they stand for."""
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    schedule, twin = schedule_for(model), copy.deepcopy(model)
    if not quantised_first:
        compress(model, schedule)
    quantization.quantize_(model, getattr(quantization, config)())
    if quantised_first:
        compress(model, schedule)
    assert flops(model, schedule) == flops(twin, schedule)
    with torch.no_grad():
        for ours, theirs in zip(model.modules(), twin.modules(), strict=True):
            if isinstance(theirs, nn.Linear):
                assert type(ours.weight) is not nn.Parameter  # type: ignore[union-attr]
                theirs.weight.copy_(ours.weight.dequantize())  # type: ignore[operator, union-attr]
        expected = compress(twin, schedule)(images())
        torch.testing.assert_close(model(images()), expected, atol=1e-3, rtol=1e-2)
