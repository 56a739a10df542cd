"""merge_reduce: the mean of tokens that share a destination, against index_add in eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch
from cases import Case, Settings, Shape, main, with_gradient
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

    def training_inputs(shape: Shape) -> tuple[Tensor, ...]:
        x, dst = inputs(shape)
        return settings.randn(shape.batch, K_M, shape.channels), x.requires_grad_(), dst

    def check_training(actual: tuple[Tensor, ...], *inputs: Tensor) -> float:
        return check_function("merge_reduce", with_gradient(with_kept(reference.merge_reduce)), actual, inputs, {})

    for shape in settings.shapes:
        row = shape.channels * settings.dtype.itemsize
        forward = shape.batch * ((K_P + K_M) * row + shape.tokens * 8)
        yield Case(
            operator="merge_reduce",
            label=shape.label,
            shape=shape,
            ours=with_kept(ops.merge_reduce),
            rivals={"eager": with_kept(rivals.merge_reduce)},
            make_inputs=partial(inputs, shape),
            check=check,
            moved=forward,
            operations=2 * shape.batch * K_P * shape.channels,
        )
        if settings.on_gpu:
            yield Case(
                operator="merge_reduce",
                label=f"{shape.label}, with gradients",
                shape=shape,
                ours=with_gradient(with_kept(ops.merge_reduce)),
                rivals={"eager": with_gradient(with_kept(rivals.merge_reduce))},
                make_inputs=partial(training_inputs, shape),
                check=check_training,
                moved=forward + shape.batch * ((K_M + shape.tokens) * row + shape.tokens * 8),
                operations=4 * shape.batch * K_P * shape.channels,
                trains=True,
            )


def with_kept(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, dst: Tensor) -> Tensor:
        return operator(x, dst, K_M)

    return call


if __name__ == "__main__":
    main(cases)
