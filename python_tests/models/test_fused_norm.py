"""Compressed blocks let prune_merge normalise the tokens for the MLP, where that is what norm2 would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from called_operators import CalledOperators
from normed_models import NORMED, compressed_of
from timm.layers import RmsNorm
from tiny_models import blocks_of, tiny_images
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs

from diffrate_ext.models.fusing import fusable_norm

FUSED, APART = "prune_merge_norm", "prune_merge"
X = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=NORMED)
def model(request: pytest.FixtureRequest) -> Any:
    return compressed_of(request.param)


def blocks_with(model: nn.Module, images: Tensor, name: str) -> int:
    with CalledOperators() as called:
        model(images)
    return called.names.count(name)


def every_second_block(model: Any) -> list[Any]:
    return blocks_of(model)[1::2]


def hook_forward(norm: nn.Module) -> list[Any]:
    calls: list[Any] = []
    norm.register_forward_hook(lambda module, inputs, output: calls.append(output))
    return calls


def hook_before(norm: nn.Module) -> list[Any]:
    calls: list[Any] = []
    norm.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    return calls


def own_forward(norm: nn.Module) -> list[Any]:
    calls: list[Any] = []
    forward = norm.forward

    def remember(x: Tensor) -> Tensor:
        calls.append(x)
        return forward(x)

    norm.forward = remember  # type: ignore[method-assign]
    return calls


@torch.no_grad()
@pytest.mark.parametrize("watch", [hook_forward, hook_before, own_forward])
def test_the_same_as_with_modules_that_are_watched(model: nn.Module, watch: Callable[[nn.Module], list[Any]]) -> None:
    """What hooks see, and another forward, is what it was without the fusion."""
    images = tiny_images(model)
    fused = model(images)
    reducing = blocks_with(model, images, FUSED)
    assert reducing >= 3
    assert blocks_with(model, images, APART) == 0
    calls = [watch(block.norm2) for block in blocks_of(model)]
    torch.testing.assert_close(model(images), fused)
    assert [len(found) for found in calls] == [1] * len(calls)
    assert blocks_with(model, images, FUSED) == 0
    assert blocks_with(model, images, APART) == reducing


@torch.no_grad()
def test_a_hook_may_replace_what_the_norm_makes(model: nn.Module) -> None:
    images = tiny_images(model)
    before = model(images)
    handles = [block.norm2.register_forward_hook(lambda *_: 0 * _[2]) for block in every_second_block(model)]
    assert not torch.allclose(model(images), before)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(images), before)


@torch.no_grad()
def test_global_hooks_see_every_norm(model: nn.Module) -> None:
    images = tiny_images(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(images)
    finally:
        handle.remove()
    for block in blocks_of(model):
        assert sum(module is block.norm2 for module in seen) == 1


def test_apart_where_gradients_are_needed(model: nn.Module) -> None:
    images = tiny_images(model)
    with torch.no_grad():
        fused = model(images)
    model.zero_grad()
    assert blocks_with(model, images, FUSED) == 0
    logits = model(images)
    torch.testing.assert_close(logits, fused)
    logits.square().sum().backward()
    for block in blocks_of(model):
        assert block.norm2.weight.grad is not None
        assert block.norm2.weight.grad.abs().sum() > 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert blocks_with(model, images, FUSED) >= 3
    assert blocks_with(model, images.clone().requires_grad_(), FUSED) == 0


def test_backward_hooks_of_norms_fire(model: nn.Module) -> None:
    """With gradients the module itself is called."""
    seen: list[nn.Module] = []
    for block in blocks_of(model):
        block.norm2.register_full_backward_hook(lambda module, *_: seen.append(module))  # type: ignore[operator]
    model(tiny_images(model)).sum().backward()
    assert {id(module) for module in seen} == {id(block.norm2) for block in blocks_of(model)}
    assert fusable_norm(nn.LayerNorm(16), X, X) is None


@torch.no_grad()
def test_apart_under_autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert blocks_with(model, tiny_images(model), FUSED) == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    images = tiny_images(model).to(dtype)
    fused = model(images)
    assert blocks_with(model, images, FUSED) >= 3
    for block in blocks_of(model):
        hook_forward(block.norm2)
    torch.testing.assert_close(model(images), fused)


@torch.no_grad()
def test_compiled_models_are_fused_too(model: nn.Module) -> None:
    torch._dynamo.reset()
    images, recorder = tiny_images(model), EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)(images)
    torch.testing.assert_close(compiled, model(images))
    (graph,) = recorder.graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("prune_merge_norm" in target for target in targets) == blocks_with(model, images, FUSED)


# --- fusable_norm


class SubclassedNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def fast(norm: Any) -> Any:
    norm._fast_norm = True
    return norm


def changed(attribute: str, value: Any) -> nn.Module:
    norm = nn.LayerNorm(16)
    setattr(norm, attribute, value)
    return norm


@torch.no_grad()
def test_what_a_norm_becomes() -> None:
    for norm in (nn.LayerNorm(16, eps=0.25), nn.LayerNorm(16, bias=False)):
        found = fusable_norm(norm, X, X)
        assert found is not None
        assert found.weight is norm.weight
        assert found.bias is norm.bias
        assert found.eps == norm.eps


@torch.no_grad()
@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity(),
        RmsNorm(16),
        SubclassedNorm(16),
        nn.LayerNorm(16, elementwise_affine=False),
        nn.LayerNorm((17, 16)),
        nn.LayerNorm(16, device="meta"),
        nn.LayerNorm(16, dtype=torch.float16),
        changed("bias", nn.Parameter(torch.ones(16).half())),
        fast(nn.LayerNorm(16)),
        torch.nn.utils.parametrizations.weight_norm(nn.LayerNorm(16), dim=None),
    ],
    ids=lambda norm: f"{type(norm).__name__}",
)
def test_what_is_left_alone(norm: nn.Module) -> None:
    assert fusable_norm(norm, X, X) is None


@torch.no_grad()
def test_tokens_of_two_dtypes_are_left_alone() -> None:
    assert fusable_norm(nn.LayerNorm(16), X, X.half()) is None
    assert fusable_norm(nn.LayerNorm(16), X.half(), X.half()) is None
    assert fusable_norm(nn.LayerNorm(16).half(), X.half(), X.half()) is not None
