"""masked_prune_merge, forward and backward, against eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch
from cases import Case, Settings, Shape, main
from checks import check_masked_prune_merge
from torch import Tensor

from diffrate_ext import ops

ALIVE, KEPT_P, KEPT_M = 180, 168, 156  # block 3 of DeiT-S at 2.9 GFLOPs


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Any, ...]:
        grad_x, x = (settings.randn(shape.batch, shape.tokens, shape.channels) for _ in range(2))
        # tokens come in the order of the block before, with what is masked at the end, and unimportant
        device = settings.device
        mask = (torch.arange(shape.tokens, device=device) < ALIVE).float().repeat(shape.batch, 1)
        importance = settings.importance(shape) + mask[:, 1:]
        probabilities = torch.rand(2, shape.tokens, device=device)
        kept = torch.tensor([KEPT_P, KEPT_M], dtype=torch.float32, device=device)
        grad_mask = torch.randn(mask.shape, device=device)
        leaves = [tensor.requires_grad_() for tensor in (x, mask, *probabilities.unbind())]
        return grad_x, grad_mask, *leaves[:2], importance, settings.sizes(shape), *leaves[2:], *kept

    for shape in settings.search_shapes:
        elements = shape.batch * shape.tokens * shape.channels
        yield Case(
            operator="masked_prune_merge",
            label=f"{shape.label}, with gradients",
            shape=shape,
            ours=training(ops.masked_prune_merge),
            rivals={"eager": training(rivals.masked_prune_merge)},
            make_inputs=partial(inputs, shape),
            check=check_masked_prune_merge,
            moved=4 * elements * settings.dtype.itemsize,
            operations=2 * shape.batch * (KEPT_P - KEPT_M) * (KEPT_M - 1) * shape.channels,
            trains=True,
        )


def training(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """x, mask, size, order, dst, and the gradients of x, the mask and both probabilities."""

    def step(grad_x: Tensor, grad_mask: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = operator(*inputs)
        x, mask, _, _, prune_prob, merge_prob, _, _ = inputs
        gradients = torch.autograd.grad(results[:2], (x, mask, prune_prob, merge_prob), (grad_x, grad_mask))
        return *(result.detach() for result in results), *gradients

    return step


if __name__ == "__main__":
    main(cases)
