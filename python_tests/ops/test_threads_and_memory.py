"""Results do not depend on the number of threads, and offsets may be larger than 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_same
from hypothesis import given, settings
from samples import tensors
from strategies import MASKS, AttentionCase, TokenCase, attention_cases, kept_numbers, token_cases
from torch import Tensor

from diffrate_ext import ops

THREADS = (2, 3, 5)  # more and fewer than the images of the cases, which takes the kernels' two paths


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_threads(function: Any) -> None:
    with threads(1):
        expected = tensors(function())
    for number in THREADS:
        with threads(number):
            actual = tensors(function())
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(f"result {index} with {number} threads", a, b)


@settings(max_examples=15)
@given(case=token_cases(), data=st.data())
def test_tokens(case: TokenCase, data: st.DataObject) -> None:
    x, importance, size = case.x(), case.importance(), case.size()
    k_p, k_m = data.draw(kept_numbers(case.tokens, case.prefix))
    residual = data.draw(st.sampled_from([None, case.x(salt=4)]))
    dst = torch.randint(-1, k_m, (case.images, case.tokens), generator=torch.Generator().manual_seed(case.seed))
    gradient = case.gradient(k_m)
    options: dict[str, Any] = {"prefix": case.prefix, "mean_rule": data.draw(st.sampled_from(["mean", "weighted"]))}
    check_threads(lambda: ops.sort_tokens(x, importance, size, prefix=case.prefix))
    check_threads(lambda: ops.prune_merge(x, importance, k_p, k_m, size, residual=residual, **options))
    norm = ops.Norm(torch.linspace(0, 1, case.channels).to(case.dtype))
    check_threads(lambda: ops.prune_merge(x, importance, k_p, k_m, size, residual=residual, norm=norm, **options))
    check_threads(lambda: ops.merge_reduce(x, dst, k_m, weights=size, residual=residual))
    check_threads(lambda: torch.ops.diffrate.merge_reduce_backward(gradient, dst, size))


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("features", ["codebook", "duplicates", "clustered"])
def test_many_parts(images: int, features: str) -> None:
    """Enough tokens that every thread has several blocks of them; ties across parts go to the lower position."""
    case = TokenCase(images, 400, 24, 1, torch.float32, features=features, importances="ties", seed=images)
    x, importance = case.x(), case.importance()
    check_threads(lambda: ops.prune_merge(x, importance, 390, 300))
    check_threads(lambda: ops.prune_merge(x, importance, 390, 150))
    check_threads(lambda: ops.bipartite_match(x, 70))


@settings(max_examples=15)
@given(case=attention_cases(least_prefix=1))
def test_attention(case: AttentionCase) -> None:
    q, k, _ = case.qkv()
    size = case.size()
    check_threads(lambda: ops.class_attention(q, k, size, scale=case.scale, prefix=case.prefix))
    check_threads(lambda: ops.received_attention(q, k, size, scale=case.scale, prefix=case.prefix))
    if case.tokens >= case.prefix + 3:
        check_threads(lambda: ops.bipartite_match(k, 1 + (case.tokens - case.prefix - 2) // 3, prefix=case.prefix))


@settings(max_examples=15)
@given(case=attention_cases(least_prefix=1, most_tokens=257), mask_kind=st.sampled_from(MASKS), data=st.data())
def test_masked_attention(case: AttentionCase, mask_kind: str, data: st.DataObject) -> None:
    importance_from = data.draw(st.sampled_from(["class", "received"]))
    options: dict[str, Any] = {"scale": case.scale, "prefix": case.prefix, "importance_from": importance_from}
    leaves = [tensor.detach().requires_grad_() for tensor in (*case.qkv(), case.mask(mask_kind))]
    size, gradient = case.size(), case.gradient()

    def train() -> tuple[Tensor, ...]:
        out, measured = ops.masked_attention(*leaves, size, **options)
        return out, measured, *torch.autograd.grad(out, leaves, gradient)

    check_threads(train)


@settings(max_examples=15)
@given(case=token_cases(), data=st.data())
def test_masked_tokens(case: TokenCase, data: st.DataObject) -> None:
    kept_p, kept_m = data.draw(kept_numbers(case.tokens, case.prefix))
    alive = data.draw(st.integers(case.prefix, case.tokens))
    x, prob = case.x().requires_grad_(), torch.ones(case.tokens, dtype=case.wide, requires_grad=True)
    # the last ones are masked, and stay the last
    importance = torch.rand(case.images, case.tokens, generator=torch.Generator().manual_seed(case.seed))
    position = torch.arange(case.tokens).expand(case.images, -1)
    mask = (position < alive).to(case.wide)
    importance = importance + mask
    kept = [torch.tensor(number, dtype=case.wide) for number in (kept_p, kept_m)]
    size, gradient = case.size(), case.gradient(case.tokens)
    options: dict[str, Any] = {"prefix": case.prefix, "size_rule": data.draw(st.sampled_from(["cosine", "sum"]))}

    def train() -> tuple[Tensor, ...]:
        results = ops.masked_prune_merge(x, mask, importance, size, prob, prob, *kept, **options)
        gradients = torch.autograd.grad(results[:2], [x, prob], [gradient, torch.ones_like(mask)], allow_unused=True)
        return *results, *(found for found in gradients if found is not None)

    check_threads(train)


def test_many_masked_parts() -> None:
    """Enough tokens that every thread has several blocks of them."""
    case = TokenCase(2, 400, 24, 1, torch.float32, features="codebook", importances="ties")
    x, importance, ones = case.x(), case.importance(), torch.ones(2, 400)
    for kept in ((390.0, 300.0), (390.0, 150.0), (200.0, 200.0)):
        numbers = [torch.tensor(number) for number in kept]
        check_threads(lambda: ops.masked_prune_merge(x, ones, importance, None, ones[0], ones[0], *numbers))  # noqa: B023


FAR = 2**30 + 7  # elements between tokens: the third one is further away than 32 bits count


@pytest.fixture
def far_apart(tmp_path: Path) -> Tensor:
    """Tokens (1, 3, 4) in float16 that lie gigabytes apart, in a sparse file of which only a few pages exist."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2 * (2 * FAR + 4))
    flat = torch.from_file(str(path), shared=True, size=2 * FAR + 4, dtype=torch.float16)
    x = flat.as_strided((1, 3, 4), (3 * FAR, FAR, 1))
    return x.copy_(torch.tensor([[[1, 0, 0, 0], [0, 2, 1, 0], [0, 4, 4, 0]]]))


def test_offsets_beyond_32_bits(far_apart: Tensor) -> None:
    near = far_apart.contiguous()
    importance = torch.tensor([[1.0, 2.0]])
    dst = torch.tensor([[1, 0, 0]])
    norm = ops.Norm(torch.ones(4, dtype=torch.float16))
    ones, kept = torch.ones(1, 3), (torch.tensor(3.0), torch.tensor(2.0))
    order, merged = torch.tensor([[0, 2, 1]]), torch.tensor([[0, 1, 1]])
    for function in (
        lambda x: ops.sort_tokens(x, importance),
        lambda x: ops.prune_merge(x, importance, 3, 2, residual=x),
        lambda x: ops.merge_reduce(x, dst, 2, residual=x),
        lambda x: ops.add_norm(x, x, norm),
        lambda x: torch.ops.diffrate.merge_reduce_backward(x, dst + 1),
        lambda x: ops.class_attention(x[:, None], x[:, None]),
        lambda x: ops.bipartite_match(x[:, None], 1),
        lambda x: ops.received_attention(x[:, None], x[:, None]),
        lambda x: ops.prune_merge(torch.ones(1, 3, 2), x.transpose(1, 2)[:, :, :3], 2, 2),
        lambda x: ops.masked_attention(x[:, None], x[:, None], x[:, None], ones),
        lambda x: torch.ops.diffrate.masked_attention_backward(*[x[:, None]] * 4, ones, None, 1.0),
        lambda x: ops.masked_prune_merge(x, ones, importance, None, ones[0], ones[0], *kept),
        lambda x: torch.ops.diffrate.masked_prune_merge_backward(x, ones, ones, order, merged, *kept, 1),
    ):
        for a, b in zip(tensors(function(far_apart)), tensors(function(near)), strict=True):
            assert_same("result", a, b)
