"""DiffRate's options: what a block does by each of them, token by token, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from tiny_models import tiny_caformer, tiny_images, tiny_vit
from torch import Tensor, nn

from diffrate_ext import InputValueError, Schedule, compressed_copy, flops, ops, uniform_schedule
from diffrate_ext.methods import DiffRate, method_of
from diffrate_ext.models.adapter import TokenRules
from diffrate_ext.models.compressed import TokenState

RULES = {
    "class token": TokenRules(1, "class"),
    "registers": TokenRules(3, "class"),
    "no class token": TokenRules(0, "received"),
    "CAFormer": TokenRules(0, "received", size_rule="sum", spares_most_important=True),
}
METHODS = [
    DiffRate(*options)
    for options in itertools.product(
        ("tokens", "keys"),
        ("prune_merge", "merge_prune", "prune", "merge"),
        ("attention", "received", "value_norm", "random"),
    )
]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def importance_of(method: DiffRate, rules: TokenRules, q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> list[float]:
    """Of each patch of one image, from (H, N, D)."""
    heads, tokens, _ = q.shape
    attention = [((q[h] @ k[h].T) * 0.5 + size.log()).softmax(-1) for h in range(heads)]
    measure = rules.importance_from if method.importance == "attention" else method.importance
    found = []
    for token in range(rules.prefix, tokens):
        by_head = []
        for h in range(heads):
            if measure == "received":
                by_head.append(float(sum(attention[h][query, token] for query in range(tokens)) / tokens))
            else:
                norm = float(v[h, token].square().sum().sqrt()) if measure == "value_norm" else 1.0
                by_head.append(float(attention[h][0, token]) * norm)
        found.append(sum(by_head) / heads)
    return found


def reduced(
    method: DiffRate,
    rules: TokenRules,
    x: Tensor,
    keys: Tensor,
    importance: list[float],
    size: Tensor,
    k_p: int,
    k_m: int,
) -> tuple[Tensor, Tensor, list[int]]:
    """One image's tokens (N, C) that are left, their sizes, and where each token is."""
    tokens, prefix = len(x), rules.prefix
    order = [*range(prefix), *sorted(range(prefix, tokens), key=lambda token: -importance[token - prefix])]
    if method.operations == "prune_merge":
        pruned, sources, stay = order[k_p:], order[k_m:k_p], order[:k_m]
    elif method.operations == "merge_prune":
        left = tokens - (k_p - k_m)
        pruned, sources, stay = order[k_m:left], order[left:], order[:left]
    elif method.operations == "prune":
        pruned, sources, stay = order[k_m:], [], order[:k_m]
    else:
        pruned, sources, stay = [], order[k_m:], order[:k_m]
    alike = keys if method.match == "keys" else x.detach()
    groups, sizes = {token: [token] for token in stay}, {token: float(size[token]) for token in stay}
    for source in sources:
        best = max(
            stay[prefix + rules.spares_most_important :], key=lambda token: float(cosine(alike[source], alike[token]))
        )
        groups[best].append(source)
        similar = float(cosine(alike[source], alike[best])) if rules.size_rule == "cosine" else 1.0
        sizes[best] += float(size[source]) * similar
    slot = [-1] * tokens
    out = []
    for place, token in enumerate(order[:k_m]):
        for member in groups[token]:
            slot[member] = place
        out.append(sum(x[member] for member in groups[token]) / len(groups[token]))
    assert all(slot[token] == -1 for token in pruned)
    left_sizes = torch.tensor([sizes[token] for token in order[:k_m]], dtype=size.dtype)
    return torch.stack(out), left_sizes, slot  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_block_by_loops(method: DiffRate) -> None:
    for rules in RULES.values():
        if rules.importance_from == "class" or method.importance != "value_norm":
            for seed in range(4):
                check_by_loops(method, rules, seed)


def check_by_loops(method: DiffRate, rules: TokenRules, seed: int) -> None:
    draw = Random(seed)
    tokens = draw.randint(rules.prefix + 6, 14)
    k_m = draw.randint(rules.prefix + 2, tokens - 2) if seed else tokens
    k_p = draw.randint(k_m, tokens)
    sized = bool(seed % 2)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, k, v = normal(2, 3, tokens, 4), normal(2, 3, tokens, 4), normal(2, 3, tokens, 4)
    x, branch = normal(2, tokens, 6).requires_grad_(), normal(2, tokens, 6).requires_grad_()
    size = 1 + normal(2, tokens).abs() if sized else torch.ones(2, tokens, dtype=torch.float64)

    step = method.step(rules, k_p, k_m, TokenState(size if sized else None))
    torch.manual_seed(seed)
    out = step.attend(q, k, v, 0.5)
    torch.testing.assert_close(out, ops.proportional_attention(q, k, v, size, scale=0.5, importance_from=None)[0])
    found = step.reduce(x, branch)
    if k_m == tokens:
        assert torch.equal(found, x + branch)
        assert step.slot is None
        return
    torch.manual_seed(seed)
    drawn = torch.rand(2, tokens - rules.prefix)
    expected = []
    for image in range(2):
        ranks = importance_of(method, rules, q[image], k[image], v[image], size[image])
        if method.importance == "random":
            ranks = drawn[image].tolist()
        keys = k[image].mean(0)
        expected.append(reduced(method, rules, (x + branch)[image], keys, ranks, size[image], k_p, k_m))
    wanted = torch.stack([tokens for tokens, _, _ in expected])
    torch.testing.assert_close(found, wanted)
    assert step.slot is not None
    assert step.slot.tolist() == [slot for _, _, slot in expected]
    assert step.after.size is not None
    torch.testing.assert_close(step.after.size, torch.stack([sizes for _, sizes, _ in expected]))
    weights = normal(*found.shape)
    for gradient, by_loops in zip(
        torch.autograd.grad((found * weights).sum(), [x, branch]),
        torch.autograd.grad((wanted * weights).sum(), [x, branch]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, by_loops)


@pytest.mark.parametrize("method", [method for method in METHODS if method != DiffRate()], ids=str)
def test_every_option_changes_the_model(method: DiffRate) -> None:
    """... and half precision, autocast and compiled models take them."""
    model: Any = tiny_vit()
    images, schedule = tiny_images(model), Schedule([17, 13, 9, 9], [17, 9, 7, 4])

    def logits(method: str) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return compressed_copy(model, schedule, method=method)(images)

    assert method_of(str(method)) == method
    assert not torch.allclose(logits(str(method)), logits("diffrate"))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(str(method)).isfinite().all()


@pytest.mark.parametrize("operations", ["prune_merge", "merge_prune", "prune", "merge"])
def test_uniform_schedules_of_every_order(operations: str) -> None:
    model, text = tiny_vit(), f"diffrate:operations={operations}"
    target = 0.7 * flops(model) / 1e9
    schedule = uniform_schedule(model, target, method=text)
    assert schedule.method == ("diffrate" if operations == "prune_merge" else text)
    assert flops(model, schedule) / 1e9 == pytest.approx(target, rel=0.03)
    assert (schedule.after_pruning is None) == (operations in ("prune", "merge"))
    if schedule.after_pruning is not None:  # half of what goes is pruned
        for before, pruned, merged in zip(
            (17, *schedule.after_merging), schedule.after_pruning, schedule.after_merging, strict=False
        ):
            assert abs((before - pruned) - (pruned - merged)) <= 1
    assert compressed_copy(model, schedule)(tiny_images(model)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_vit, "match=values", "option match of method 'diffrate' must be one of tokens, keys, got 'values'"),
        (
            tiny_vit,
            "operations=merge_merge",
            "must be one of prune_merge, merge_prune, prune, merge, got 'merge_merge'",
        ),
        (tiny_vit, "importance=class", "must be one of attention, received, value_norm, random, got 'class'"),
        (tiny_caformer, "operations=prune", "a MetaFormer is only merged, and operations=prune prunes"),
        (tiny_caformer, "importance=value_norm", "a class token, which this MetaFormer lacks"),
        (
            lambda: tiny_vit(class_token=False, global_pool="avg"),
            "importance=value_norm",
            "this VisionTransformer lacks",
        ),
    ],
)
def test_refused(make: Callable[[], nn.Module], options: str, message: str) -> None:
    model = make()
    with pytest.raises(InputValueError, match=re.escape(message)):
        uniform_schedule(model, 0.7 * flops(model) / 1e9, method=f"diffrate:{options}")


def test_merging_leaves_a_patch_to_merge_into() -> None:
    with pytest.raises(InputValueError, match="operations=merge keeps a patch to merge into, 2 tokens or more"):
        compressed_copy(tiny_vit(), Schedule([17, 9, 9, 1], [17, 9, 9, 1]), method="diffrate:operations=merge")
