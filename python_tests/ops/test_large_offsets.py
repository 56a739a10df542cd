"""Images that lie more than 2^31 elements apart, as in a batch too large for 32-bit offsets: the same results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_same
from torch import Tensor

from diffrate_ext import ops

STRIDE = 2**31 + 64
DTYPE = torch.bfloat16
IMAGES, HEADS, TOKENS, CHANNELS = 2, 2, 17, 16


def far_apart(x: Tensor) -> Tensor:
    """x with images STRIDE elements apart. What lies between them is never touched, so it takes no memory on a CPU."""
    try:
        memory = torch.empty(STRIDE * (len(x) - 1) + x[0].numel(), dtype=x.dtype, device=x.device)
    except RuntimeError as error:
        pytest.skip(f"no room for {STRIDE} elements: {error}")
    return memory.as_strided(x.shape, (STRIDE, *x.stride()[1:])).copy_(x)


def prune_merge(x: Tensor) -> tuple[Tensor, ...]:
    importance = torch.linspace(0, 1, TOKENS, device=x.device).expand(IMAGES, -1)
    norm = ops.Norm(torch.ones(CHANNELS, device=x.device, dtype=x.dtype))
    return ops.prune_merge(x, importance, 14, 9, residual=x, norm=norm)


def sort_tokens(x: Tensor) -> tuple[Tensor, ...]:
    return ops.sort_tokens(x, torch.linspace(0, 1, TOKENS, device=x.device).expand(IMAGES, -1))


def merge_reduce(x: Tensor) -> tuple[Tensor, ...]:
    dst = (torch.arange(TOKENS, device=x.device) % 5).expand(IMAGES, -1)
    return ops.merge_reduce(x, dst, 5, residual=x), torch.ops.diffrate.merge_reduce_backward(x[:, :5], dst)


def masked_prune_merge(x: Tensor) -> tuple[Tensor, ...]:
    ones = torch.ones(IMAGES, TOKENS, device=x.device)
    kept = [torch.tensor(number, device=x.device) for number in (14.0, 9.0)]
    importance = torch.linspace(0, 1, TOKENS - 1, device=x.device).expand(IMAGES, -1)
    results = ops.masked_prune_merge(x, ones, importance, None, ones[0], ones[0], *kept)
    choices = results.order, results.dst
    return *results, *torch.ops.diffrate.masked_prune_merge_backward(x, ones, ones, *choices, *kept, 1)


def attention(x: Tensor) -> tuple[Tensor, ...]:
    q = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    mask = (torch.arange(TOKENS, device=x.device) < 12).float().expand(IMAGES, -1)
    masked = ops.masked_attention(q, q, q, mask)
    gradients = torch.ops.diffrate.masked_attention_backward(q, q, q, q, mask, None, 0.5)
    plain, importance = ops.proportional_attention(q, q, q)
    assert importance is not None
    matched = ops.bipartite_match(q, 4)
    return matched, ops.class_attention(q, q), ops.received_attention(q, q), plain, importance, *masked, *gradients


@pytest.mark.parametrize("function", [prune_merge, sort_tokens, merge_reduce, masked_prune_merge, attention])
def test_offsets_beyond_32_bits(device: torch.device, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.randn(IMAGES, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(device, DTYPE)
    far = far_apart(x)
    assert far.stride(0) > 2**31
    for index, (actual, expected) in enumerate(zip(function(far), function(x), strict=True)):
        assert_same(f"result {index}", actual, expected)
