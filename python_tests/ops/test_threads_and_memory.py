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
from strategies import AttentionCase, TokenCase, attention_cases, kept_numbers, token_cases
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
    residual = data.draw(st.sampled_from([None, case.x(4)]))
    dst = torch.randint(-1, k_m, (case.images, case.tokens), generator=torch.Generator().manual_seed(case.seed))
    gradient = case.gradient(k_m)
    options: dict[str, Any] = {"prefix": case.prefix, "features": data.draw(st.sampled_from(["mean", "weighted"]))}
    check_threads(lambda: ops.sort_tokens(x, importance, size, prefix=case.prefix))
    check_threads(lambda: ops.prune_merge(x, importance, k_p, k_m, size, residual=residual, **options))
    check_threads(lambda: ops.merge_reduce(x, dst, k_m, weights=size))
    check_threads(lambda: torch.ops.diffrate.merge_reduce_backward(gradient, dst, size))


@pytest.mark.parametrize("images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("features", ["codebook", "clustered"])
def test_many_parts(images: int, features: str) -> None:
    """Enough tokens that every thread has several blocks of them; ties across parts go to the lower position."""
    case = TokenCase(images, 400, 24, 1, torch.float32, features=features, importances="ties", seed=images)
    x, importance = case.x(), case.importance()
    check_threads(lambda: ops.prune_merge(x, importance, 390, 300))
    check_threads(lambda: ops.prune_merge(x, importance, 390, 150))


@settings(max_examples=15)
@given(case=attention_cases(least_prefix=1))
def test_attention(case: AttentionCase) -> None:
    q, k, _ = case.qkv()
    size = case.size()
    check_threads(lambda: ops.class_attention(q, k, size, scale=case.scale, prefix=case.prefix))
    check_threads(lambda: ops.received_attention(q, k, size, scale=case.scale, prefix=case.prefix))


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
    for function in (
        lambda x: ops.sort_tokens(x, importance),
        lambda x: ops.prune_merge(x, importance, 3, 2, residual=x),
        lambda x: ops.merge_reduce(x, dst, 2),
        lambda x: torch.ops.diffrate.merge_reduce_backward(x, dst + 1),
        lambda x: ops.class_attention(x[:, None], x[:, None]),
        lambda x: ops.received_attention(x[:, None], x[:, None]),
        lambda x: ops.prune_merge(torch.ones(1, 3, 2), x.transpose(1, 2)[:, :, :3], 2, 2),
    ):
        for a, b in zip(tensors(function(far_apart)), tensors(function(near)), strict=True):
            assert_same("result", a, b)
