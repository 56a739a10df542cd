"""What stands in for the CUDA kernels that are not written yet, compared on the CPU with the operators there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import tensors

from diffrate_ext import _composites

IMAGES, HEADS, TOKENS, CHANNELS = 3, 2, 17, 8
ops: Any = torch.ops.diffrate


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V, GRAD = (random(IMAGES, HEADS, TOKENS, CHANNELS, seed=seed) for seed in range(4))
MASK = (torch.arange(TOKENS) < 11).double().expand(IMAGES, -1)
SIZE = random(IMAGES, TOKENS, seed=4).abs() + 0.5
LOGITS = random(5, 4, seed=5)
X = random(IMAGES, TOKENS, CHANNELS, seed=6)
KEEP = torch.linspace(1, 0, TOKENS, dtype=torch.float64)
IMPORTANCE = torch.arange(TOKENS - 1, 0, -1).double().expand(IMAGES, -1)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


CALLS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "class_attention": ((Q, K, SIZE, 0.3, 1), (Q, K, None, 0.3, 2)),
    "received_attention": ((Q, K, SIZE, 0.3, 0), (Q, K, None, 0.3, 1)),
    "masked_attention": ((Q, K, V, MASK, SIZE, 0.3, 1, "class"), (Q, K, V, MASK, None, 0.3, 0, "received")),
    "masked_attention_backward": ((GRAD, Q, K, V, MASK, SIZE, 0.3), (GRAD, Q, K, V, MASK, None, 0.3)),
    "compression_rate": ((LOGITS, 16, 4, 1), (LOGITS, 4, 1, 0)),
    "compression_rate_backward": ((LOGITS[:, 0], random(5, 17, seed=7), LOGITS, 16, 4, 1),),
    "masked_prune_merge": (
        (X, MASK, IMPORTANCE, SIZE, KEEP, KEEP, number(9), number(6), 1, "cosine"),
        (X, MASK, IMPORTANCE, None, KEEP, KEEP, number(20), number(8), 1, "sum"),
    ),
}


def test_every_composite_is_compared() -> None:
    assert {composite.__name__ for composite in _composites.ALL} == set(CALLS)


@pytest.mark.parametrize("composite", _composites.ALL, ids=lambda composite: composite.__name__)
def test_composite(composite: Any) -> None:
    for arguments in CALLS[composite.__name__]:
        expected = tensors(getattr(ops, composite.__name__)(*arguments))
        for actual, right in zip(tensors(composite(*arguments)), expected, strict=True):
            torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-12)
            assert actual.stride() == right.stride()
