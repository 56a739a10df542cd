"""A compressed block writes its last sum together with the next block's first norm, where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from called_operators import CalledOperators
from normed_models import NORMED, compressed_of
from tiny_models import blocks_of, tiny_images, tiny_schedule, tiny_vit
from torch import Tensor, nn

from diffrate_ext import compress
from diffrate_ext.models.norm_ahead import NormAhead


@pytest.fixture(params=NORMED)
def model(request: pytest.FixtureRequest) -> Any:
    return compressed_of(request.param)


def fused_in(model: nn.Module) -> int:
    with CalledOperators() as called:
        model(tiny_images(model))
    return called.names.count("add_norm")


def within_blocks(model: Any) -> int:
    """Blocks that remove nothing: there the sum before the MLP and its norm are one pass, too."""
    return 3 if hasattr(model, "stages") else 1


def test_between_all_blocks_of_a_stage(model: Any) -> None:
    stages = len([stage for stage in model.stages if not stage.use_nchw]) if hasattr(model, "stages") else 1
    with torch.no_grad():
        assert fused_in(model) == len(blocks_of(model)) - stages + within_blocks(model)


def apart(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(NormAhead, "between", lambda *_: None)
        assert fused_in(model) == within_blocks(model)
        return model(tiny_images(model))


@torch.no_grad()
def test_the_same_result(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(model(tiny_images(model)), apart(model, monkeypatch))


def ramp(tokens: Tensor) -> Tensor:
    """Factors that a norm does not divide out again."""
    return torch.linspace(0.5, 2.0, tokens.shape[-1])


def changed(*arguments: Any) -> Any:
    return arguments[-1] * ramp(arguments[-1])


def changed_in_place(*arguments: Any) -> None:
    tokens = arguments[-1][0] if isinstance(arguments[-1], tuple) else arguments[-1]
    tokens.mul_(ramp(tokens))


def changed_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (changed(arguments[0]), *arguments[1:])


def own_forward(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda x, step: forward(x.mul_(ramp(x)), step)  # type: ignore[method-assign]


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.register_forward_hook(changed),
        lambda block: block.register_forward_hook(changed_in_place),
        lambda block: block.register_forward_pre_hook(changed_input),
        lambda block: block.register_forward_pre_hook(changed_in_place),
        own_forward,
        lambda block: block.norm1.register_forward_hook(changed),
    ],
    ids=["output", "output in place", "input", "input in place", "own forward", "norm"],
)
@pytest.mark.parametrize("which", [1, 2])
def test_what_changes_tokens_on_the_way_counts(
    model: nn.Module, change: Callable[[Any], Any], which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model(tiny_images(model))
    change(blocks_of(model)[which])
    found = model(tiny_images(model))
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, apart(model, monkeypatch))


def test_apart_where_gradients_are_needed(model: nn.Module) -> None:
    assert fused_in(model) == 0
    model(tiny_images(model)).square().sum().backward()
    for block in blocks_of(model):
        assert block.norm1.weight.grad is not None
        assert block.norm1.weight.grad.abs().sum() > 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert fused_in(model) > 0


@torch.no_grad()
def test_apart_under_a_compiler(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fuses the two by itself, with what comes before."""
    first, second, third = blocks_of(model)[:3]
    assert NormAhead.between(first, second) is not None
    assert NormAhead.between(torch.compile(first), second) is None
    assert NormAhead.between(first, torch.compile(second)) is None
    second.compile()
    assert NormAhead.between(first, second) is None
    assert NormAhead.between(second, third) is None
    second._compiled_call_impl = None
    with monkeypatch.context() as patch:
        patch.setattr("diffrate_ext.models.norm_ahead.is_traced", lambda: True)
        assert fused_in(model) == within_blocks(model)
        patch.setattr("diffrate_ext.methods.dropping.is_traced", lambda: True)
        assert fused_in(model) == 0


class BringsItsWeights(nn.Module):
    """As FSDP1 does: what the block needs is there while its forward runs, and its attributes show through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner, self.away = block, {name: p.detach().clone() for name, p in block.named_parameters()}
        self.put_away()

    def put_away(self) -> None:
        for parameter in self.inner.parameters():
            parameter.zero_()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments: Any) -> Tensor:
        for name, parameter in self.inner.named_parameters():
            parameter.copy_(self.away[name])
        result = self.inner(*arguments)
        self.put_away()
        return result


@torch.no_grad()
def test_wrappers_that_bring_the_weights() -> None:
    model = tiny_vit()
    compress(model, tiny_schedule(model))
    expected = model(tiny_images(model))
    for index in (1, 2):
        model.blocks[index] = BringsItsWeights(model.blocks[index])
    torch.testing.assert_close(model(tiny_images(model)), expected)


@torch.no_grad()
def test_the_norm_is_forgotten_once_it_was_asked_for() -> None:
    norm = nn.LayerNorm(8)
    ahead = NormAhead(norm)
    x = ahead.add(torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    other = torch.randn(1, 3, 8)
    torch.testing.assert_close(ahead.take(other), norm(other))
    with CalledOperators() as called:
        torch.testing.assert_close(ahead.take(x), norm(x))
    assert called.names == []
    assert ahead._written is None
