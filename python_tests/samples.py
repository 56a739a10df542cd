"""Sample calls of every operator, for the tests that treat all operators alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffrate_ext import ops


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _positive(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 1 + torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _destinations(*shape: int, kept: int) -> Tensor:
    return torch.randint(-1, kept, shape, generator=torch.Generator().manual_seed(kept))


def _mask(images: int, tokens: int) -> Tensor:
    """Two tokens of each image are masked."""
    mask = torch.ones(images, tokens)
    mask[:, 5] = mask[:, tokens - 1] = 0
    return mask


@dataclass(frozen=True)
class Sample:
    """A public operator on inputs for any number of images, and which of its tensors can require a gradient."""

    name: str
    function: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    differentiable: int  # so many of the inputs, from the first


def _samples() -> list[Sample]:
    def prune_merge(x: Tensor, residual: Tensor, attn: Tensor, size: Tensor) -> Any:
        return ops.prune_merge(x, attn, 14, 9, size, residual=residual)

    def normalized(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, attn: Tensor, size: Tensor) -> Any:
        return ops.prune_merge(x, attn, 14, 9, size, residual=residual, norm=ops.Norm(weight, bias, 1e-6))

    def weighted(x: Tensor, attn: Tensor, size: Tensor) -> Any:
        options: dict[str, Any] = {"importance_from": "received", "mean_rule": "weighted", "size_rule": "sum"}
        return ops.prune_merge(x, attn, 17, 9, size, prefix=0, **options)

    def masked_prune_merge(x: Tensor, mask: Tensor, p: Tensor, m: Tensor, importance: Tensor, *rest: Tensor) -> Any:
        size, kept_p, kept_m = rest
        return ops.masked_prune_merge(x, mask, importance, size, p, m, kept_p, kept_m)

    def masked_sum(x: Tensor, mask: Tensor, p: Tensor, m: Tensor, importance: Tensor, *rest: Tensor) -> Any:
        _, kept_p, kept_m = rest
        return ops.masked_prune_merge(x, mask, importance, None, p, m, kept_p, kept_m, prefix=2, size_rule="sum")

    def rated_tokens(images: int, kept_p: float, kept_m: float) -> tuple[Tensor, ...]:
        features = _tensor(images, 17, 8), _mask(images, 17), _positive(17), _positive(17)
        # masked tokens are the least important
        importance = _positive(images, 17) * features[1]
        return *features, importance, _positive(images, 17), torch.tensor(kept_p), torch.tensor(kept_m)

    return [
        Sample(
            "sort_tokens",
            lambda x, importance, size: ops.sort_tokens(x, importance, size),
            lambda images: (_tensor(images, 17, 8), _tensor(images, 16), _positive(images, 17)),
            1,
        ),
        Sample(
            "prune_merge",
            prune_merge,
            lambda images: (
                _tensor(images, 17, 8),
                _tensor(images, 17, 8, seed=1),
                _tensor(images, 2, 17),
                _positive(images, 17),
            ),
            2,
        ),
        Sample(
            "prune_merge with a norm",
            normalized,
            lambda images: (
                _tensor(images, 17, 8),
                _tensor(images, 17, 8, seed=1),
                _positive(8),
                _tensor(8),
                _tensor(images, 2, 17),
                _positive(images, 17),
            ),
            4,
        ),
        Sample(
            "add_norm",
            lambda x, residual, weight, bias: ops.add_norm(x, residual, ops.Norm(weight, bias)),
            lambda images: (_tensor(images, 17, 8), _tensor(images, 17, 8, seed=1), _positive(8), _tensor(8)),
            4,
        ),
        Sample(
            "prune_merge, weighted and received",
            weighted,
            lambda images: (_tensor(images, 17, 8), _tensor(images, 2, 17, 17), _positive(images, 17)),
            1,
        ),
        Sample(
            "prune_merge that only prunes",
            lambda x, importance: ops.prune_merge(x, importance, 9, 9),
            lambda images: (_tensor(images, 17, 8), _tensor(images, 17)),
            1,
        ),
        Sample(
            "merge_reduce",
            lambda x, dst, weights: ops.merge_reduce(x, dst, 5, weights=weights),
            lambda images: (_tensor(images, 17, 8), _destinations(images, 17, kept=5), _positive(images, 17)),
            1,
        ),
        Sample(
            "merge_reduce with a residual",
            lambda x, residual, dst: ops.merge_reduce(x, dst, 5, residual=residual),
            lambda images: (
                _tensor(images, 17, 8),
                _tensor(images, 17, 8, seed=1),
                _destinations(images, 17, kept=5),
            ),
            2,
        ),
        Sample(
            "bipartite_match",
            lambda keys: ops.bipartite_match(keys, 5),
            lambda images: (_tensor(images, 2, 17, 8),),
            0,
        ),
        Sample(
            "class_attention",
            lambda q, k, size: ops.class_attention(q, k, size),
            lambda images: (_tensor(images, 2, 17, 8), _tensor(images, 2, 17, 8, seed=1), _positive(images, 17)),
            0,
        ),
        Sample(
            "received_attention",
            lambda q, k, size: ops.received_attention(q, k, size, prefix=1),
            lambda images: (_tensor(images, 2, 17, 8), _tensor(images, 2, 17, 8, seed=1), _positive(images, 17)),
            0,
        ),
        Sample(
            "proportional_attention",
            lambda q, k, v, size: ops.proportional_attention(q, k, v, size),
            lambda images: (*(_tensor(images, 2, 17, 8, seed=s) for s in range(3)), _positive(images, 17)),
            3,
        ),
        Sample(
            "proportional_attention, class rows",
            lambda q, k, v, size: ops.proportional_attention(q, k, v, size, importance_from="class_rows"),
            lambda images: (*(_tensor(images, 2, 17, 8, seed=s) for s in range(3)), _positive(images, 17)),
            3,
        ),
        Sample(
            "masked_attention",
            lambda q, k, v, mask, size: ops.masked_attention(q, k, v, mask, size),
            lambda images: (
                *(_tensor(images, 2, 17, 8, seed=s) for s in range(3)),
                _mask(images, 17),
                _positive(images, 17),
            ),
            4,
        ),
        Sample(
            "masked_attention, received and scaled",
            lambda q, k, v, mask: ops.masked_attention(q, k, v, mask, scale=0.7, prefix=0, importance_from="received"),
            lambda images: (*(_tensor(images, 2, 17, 8, seed=s) for s in range(3)), _mask(images, 17)),
            4,
        ),
        Sample(
            "compression_rate",
            lambda logits: ops.compression_rate(logits, 16, 3, 2),
            lambda proxies: (_tensor(proxies, 6),),
            1,
        ),
        Sample("masked_prune_merge", masked_prune_merge, lambda images: rated_tokens(images, 12.0, 7.0), 4),
        Sample("masked_prune_merge that only merges", masked_sum, lambda images: rated_tokens(images, 17.0, 7.0), 4),
        Sample("masked_prune_merge that only prunes", masked_sum, lambda images: rated_tokens(images, 12.0, 12.0), 4),
        Sample(
            "compose_slots",
            lambda first, second: ops.compose_slots(first, second),
            lambda images: (_destinations(images, 17, kept=9), _destinations(images, 9, kept=4)),
            0,
        ),
        Sample(
            "restore_tokens",
            lambda x, fill, slot: ops.restore_tokens(x, slot, fill),
            lambda images: (_tensor(images, 9, 8), _tensor(8), _destinations(images, 17, kept=9)),
            2,
        ),
    ]


SAMPLES = {sample.name: sample for sample in _samples()}


def tensors(result: Any) -> list[Tensor]:
    return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor is not None]
