"""The rivals equal the reference, and the checks reject wrong results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import checks
import pytest
import rival_model
import rivals
import torch
from torch import Tensor

from diffrate_ext import Schedule, reference
from diffrate_ext.embedded import build_model


def draw(batch: int = 2, tokens: int = 33, channels: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, importance, size, residual in float64, so that no two choices tie."""
    generator = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, batch, tokens, channels, generator=generator, dtype=torch.float64)
    importance = torch.rand(batch, tokens - 1, generator=generator, dtype=torch.float64)
    size = 1 + 3 * torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
    return x, importance, size, residual


def draw_qkv() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=generator, dtype=torch.float64)
    return q, k, v, 1 + torch.rand(2, 17, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rival", [rivals.sort_tokens, rivals.sort_tokens_tuned])
@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_sort_tokens_equals_reference(rival: Callable[..., Any], with_size: bool, prefix: int) -> None:
    x, importance, size, _ = draw()
    arguments = (x, importance[:, : 33 - prefix], size if with_size else None)
    if prefix == 0:
        arguments = (x[:, :32], importance, size[:, :32] if with_size else None)
    for actual, expected in zip(
        rival(*arguments, prefix=prefix), reference.sort_tokens(*arguments, prefix=prefix), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rival", [rivals.prune_merge, rivals.prune_merge_tuned])
@pytest.mark.parametrize(
    ("k_p", "k_m", "options"),
    [
        (25, 20, {}),
        (33, 2, {}),
        (33, 33, {}),
        (1, 1, {}),
        (25, 20, {"mean_rule": "weighted", "size_rule": "sum"}),
        (25, 20, {"residual": True}),
        (25, 20, {"size": None, "residual": True}),
        (25, 20, {"prefix": 4}),
    ],
)
def test_prune_merge_equals_reference(rival: Callable[..., Any], k_p: int, k_m: int, options: dict[str, Any]) -> None:
    x, importance, size, residual = draw()
    options = dict(options)
    sizes = options.pop("size", size)
    if options.get("residual"):
        options["residual"] = residual
    importance = importance[:, : 33 - options.get("prefix", 1)]
    out = rival(x, importance, k_p, k_m, sizes, **options)
    expected = reference.prune_merge(x, importance, k_p, k_m, sizes, **options)
    assert torch.equal(out[2], expected[2])
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1], expected[1])


@pytest.mark.parametrize("importance_from", ["class", "received"])
@pytest.mark.parametrize("rival", [rivals.prune_merge, rivals.prune_merge_tuned])
def test_prune_merge_reads_importance_off_a_map(rival: Callable[..., Any], importance_from: Any) -> None:
    x, _, size, _ = draw(tokens=17)
    q, k, _, _ = draw_qkv()
    attn = reference.attention_map(q, k, None, None)
    slot = rival(x, attn, 14, 10, size, importance_from=importance_from)[2]
    assert torch.equal(slot, reference.prune_merge(x, attn, 14, 10, size, importance_from=importance_from)[2])


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_reduce_equals_reference(weighted: bool) -> None:
    x, _, size, _ = draw()
    dst = torch.randint(-1, 9, (2, 33), generator=torch.Generator().manual_seed(0))
    weights = size if weighted else None
    expected = reference.merge_reduce(x, dst, 10, weights=weights)
    torch.testing.assert_close(rivals.merge_reduce(x, dst, 10, weights=weights), expected)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_bipartite_match_equals_reference_and_is_checked(prefix: int) -> None:
    keys = torch.randn(3, 2, 31, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slot = rivals.bipartite_match(keys, 7, prefix=prefix)
    assert torch.equal(slot, reference.bipartite_match(keys.mean(1), 7, prefix=prefix))
    checks.check_bipartite_match(slot, keys, 7, prefix=prefix)
    for other in (keys.flip(0), keys.roll(2, 2)):  # other tokens
        with pytest.raises(checks.WrongResultError, match="bipartite_match: misses the best cosines"):
            checks.check_bipartite_match(slot, other, 7, prefix=prefix)
    for wrong in (slot.clamp_max(20), slot.roll(1, 1), slot.flip(1)):
        with pytest.raises(checks.WrongResultError, match="bipartite_match: "):
            checks.check_bipartite_match(wrong, keys, 7, prefix=prefix)


@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_rivals_equal_reference(with_size: bool, scale: float | None) -> None:
    q, k, v, size = draw_qkv()
    sizes = size if with_size else None
    for name, arguments in (("class_attention", (q, k)), ("received_attention", (q, k)),
                            ("proportional_attention", (q, k, v))):  # fmt: skip
        actual = getattr(rivals, name)(*arguments, sizes, scale=scale)
        expected = getattr(reference, name)(*arguments, sizes, scale=scale)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("importance_from", ["class", "received"])
def test_masked_attention_equals_reference(importance_from: str) -> None:
    q, k, v, size = draw_qkv()
    mask = (torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.6).double()
    mask[:, 0] = 1
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, mask)]
    results = []
    for module in (rivals, reference):
        out, measured = module.masked_attention(*leaves, size, scale=0.7, importance_from=importance_from)
        results.append([out, measured, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rival", [rivals.compression_rate, rivals.compression_rate_loop])
@pytest.mark.parametrize(("granularity", "prefix"), [(1, 1), (5, 0), (40, 2)])
def test_compression_rate_equals_reference(rival: Callable[..., Any], granularity: int, prefix: int) -> None:
    candidates = len(range(16, 0, -granularity))
    logits = torch.randn(3, candidates, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    results = []
    for function in (rival, reference.compression_rate):
        kept, keep_prob = function(logits, 16, granularity, prefix)
        (gradient,) = torch.autograd.grad(kept.sum() + keep_prob.square().sum(), logits)
        results.append([kept, keep_prob, gradient])
    torch.testing.assert_close(*results)


def draw_search_step() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of x and mask, and the arguments of masked_prune_merge; three tokens are masked already."""
    x, importance, size, grad_x = draw()
    mask = (torch.arange(33) < 30).double().repeat(2, 1)
    probabilities = torch.rand(2, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([25.0, 20.0], dtype=torch.float64)
    arguments = [x, mask, importance + mask[:, 1:], size - 1, *probabilities, *kept]
    return [grad_x, probabilities.clone()], arguments


def step(function: Callable[..., Any], gradients: list[Tensor], arguments: list[Tensor]) -> list[Tensor]:
    leaves = [arguments[index].detach().requires_grad_() for index in (0, 1, 4, 5)]
    results = function(*leaves[:2], *arguments[2:4], *leaves[2:], *arguments[6:])
    found = torch.autograd.grad(results[:2], leaves, gradients, allow_unused=True)
    return [*(result.detach() for result in results), *(leaves[0] * 0 if g is None else g for g in found)]


@pytest.mark.parametrize(("kept_p", "kept_m"), [(25.0, 20.0), (33.0, 20.0), (25.0, 25.0), (20.0, 25.0)])
@pytest.mark.parametrize("size_rule", ["cosine", "sum"])
def test_masked_prune_merge_equals_reference(kept_p: float, kept_m: float, size_rule: str) -> None:
    gradients, arguments = draw_search_step()
    arguments[6:] = torch.tensor([kept_p, kept_m]).unbind()
    results = []
    for module in (rivals, reference):
        results.append(step(partial(module.masked_prune_merge, size_rule=size_rule), gradients, arguments))
    torch.testing.assert_close(*results)


def test_the_check_of_a_search_step_rejects_wrong_results() -> None:
    gradients, arguments = ([tensor.float() for tensor in tensors] for tensors in draw_search_step())
    right = step(reference.masked_prune_merge, gradients, arguments)
    checks.check_masked_prune_merge(tuple(right), *gradients, *arguments)
    for index in range(9):
        wrong = list(right)
        wrong[index] = right[index].flip(1) if right[index].dtype == torch.int64 else right[index] * 1.001
        with pytest.raises(checks.WrongResultError):
            checks.check_masked_prune_merge(tuple(wrong), *gradients, *arguments)
    wrong = list(right)
    wrong[4] = torch.where(right[4] == torch.arange(33), right[4], right[4] % 19 + 1)  # other destinations
    with pytest.raises(checks.WrongResultError, match="misses the best cosine"):
        checks.check_masked_prune_merge(tuple(wrong), *gradients, *arguments)


def test_eager_model_equals_the_reference_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = build_model().double().eval()
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    schedule = Schedule.published("ViT-S-DeiT", gflops=2.9)
    keep_all = Schedule([197] * 12, [197] * 12)
    with torch.no_grad():
        before = model(images)
        slow = rival_model.EagerCompressed(
            model, schedule, reference.proportional_attention, reference.prune_merge
        ).eval()(images)
        torch.testing.assert_close(rival_model.compress_eager(model, schedule).eval()(images), slow)
        torch.testing.assert_close(rival_model.compress_eager(model, keep_all).eval()(images), before)
        assert not torch.allclose(slow, before)
        assert torch.equal(model(images), before)


def test_checks_accept_the_reference_and_reject_wrong_results() -> None:
    x, importance, size, _ = (t.float() for t in draw())
    x, size, slot = reference.prune_merge(x, importance, 25, 20, size)
    inputs = [t.float() for t in draw()]
    arguments = (inputs[0], inputs[1], 25, 20, inputs[2])
    checks.check_prune_merge((x, size, slot), *arguments)

    merged = (slot >= 0).long().cumsum(1)  # any permutation of destinations is a wrong match
    other = torch.where(slot >= 1, (slot % 19) + 1, slot)
    for wrong in (
        (x + 1e-4, size, slot),
        (x, size * 1.001, slot),
        (x, size, other),
        (x, size, merged),
        (torch.full_like(x, torch.nan), size, slot),
    ):
        with pytest.raises(checks.WrongResultError):
            checks.check_prune_merge(wrong, *arguments)

    ordered = reference.sort_tokens(inputs[0], inputs[1], inputs[2])
    checks.check_sort_tokens(ordered, *inputs[:3])
    with pytest.raises(checks.WrongResultError):
        checks.check_sort_tokens((ordered[0], ordered[1], ordered[2].flip(1)), *inputs[:3])
