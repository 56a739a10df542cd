"""prune_merge: sort, prune, match and merge in one operator, against eager PyTorch and a copy of the kept tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from cases import EAGER, FLOOR, Bar, Case, Settings, Shape, is_reference_run, main
from checks import check_prune_merge
from torch import Tensor

from diffrate_ext import ops

K_P, K_M = 168, 156  # block 3 of DeiT-S at 2.9 GFLOPs
TUNED, COPY = "eager tuned", "copy of the kept tokens"


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape, with_residual: bool) -> tuple[Any, ...]:
        x, residual = (settings.randn(shape.batch, shape.tokens, shape.channels) for _ in range(2))
        return x, settings.importance(shape), settings.sizes(shape), residual if with_residual else None

    def check(actual: Any, x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None) -> float:
        return check_prune_merge(actual, x, importance, K_P, K_M, size, residual=residual)

    for shape in settings.shapes:
        kept = shape.batch * K_M * shape.channels
        yardsticks: dict[str, Callable[..., Any]] = {}
        if not settings.on_gpu:  # there it would stay in the cache, and the floor says the same
            yardsticks[COPY] = partial(copy, settings.randn(kept), settings.randn(kept))
        for with_residual in (False, True) if shape.model == "ViT-S" else (False,):
            reference_run = is_reference_run(settings, shape) and not with_residual
            bars: tuple[Bar, ...] = ()
            if reference_run:
                bars = Bar(EAGER, 10), Bar(TUNED, 10), Bar(COPY, 1 / 4, "aim")
            elif settings.judged_on_gpu and not with_residual:
                bars = Bar(FLOOR, 1 / 2), Bar(EAGER, 10), Bar(TUNED, 10)
            read = shape.batch * K_P * shape.channels * (2 if with_residual else 1)
            yield Case(
                operator="prune_merge",
                label=shape.label + (" + residual" if with_residual else ""),
                shape=shape,
                ours=with_kept_numbers(ops.prune_merge),
                rivals={
                    EAGER: with_kept_numbers(rivals.prune_merge),
                    TUNED: with_kept_numbers(rivals.prune_merge_tuned),
                },
                make_inputs=partial(inputs, shape, with_residual),
                check=check,
                moved=(read + kept) * settings.dtype.itemsize + shape.batch * (shape.tokens * (4 + 4 + 8) + K_M * 4),
                operations=2 * shape.batch * (K_P - K_M) * (K_M - 1) * shape.channels + 2 * read,
                bars=bars,
                yardsticks=yardsticks,
                compile_when_quick=reference_run,
            )


def with_kept_numbers(operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None) -> Any:
        return operator(x, importance, K_P, K_M, size, residual=residual)

    return call


def copy(source: Tensor, target: Tensor, *_: Any) -> Tensor:
    return target.copy_(source)


if __name__ == "__main__":
    main(cases)
