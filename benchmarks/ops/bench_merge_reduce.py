"""merge_reduce: the mean of tokens that share a destination, against index_add in eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch
from cases import Case, Settings, Shape, main
from checks import check_function
from torch import Tensor

from diffrate_ext import ops, reference

K_P, K_M = 168, 156


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
        """In random order: K_M tokens that stay, K_P - K_M that merge into them, and the rest, which goes nowhere."""
        sources = torch.randint(1, K_M, (shape.batch, K_P - K_M), device=settings.device)
        stay = torch.arange(K_M, device=settings.device).expand(shape.batch, -1)
        nowhere = stay.new_full((shape.batch, shape.tokens - K_P), -1)
        shuffle = torch.rand(shape.batch, shape.tokens, device=settings.device).argsort(1)
        dst = torch.cat([stay, sources, nowhere], dim=1).gather(1, shuffle)
        return settings.randn(shape.batch, shape.tokens, shape.channels), dst

    def check(actual: Tensor, x: Tensor, dst: Tensor) -> float:
        return check_function("merge_reduce", reference.merge_reduce, actual, (x, dst, K_M), {})

    for shape in settings.shapes:
        yield Case(
            operator="merge_reduce",
            label=shape.label,
            shape=shape,
            ours=with_kept(ops.merge_reduce),
            rivals={"eager": with_kept(rivals.merge_reduce)},
            make_inputs=partial(inputs, shape),
            check=check,
            moved=shape.batch * ((K_P + K_M) * shape.channels * settings.dtype.itemsize + shape.tokens * 8),
            operations=2 * shape.batch * K_P * shape.channels,
        )


def with_kept(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, dst: Tensor) -> Tensor:
        return operator(x, dst, K_M)

    return call


if __name__ == "__main__":
    main(cases)
