"""prune_merge: sort, prune, match and merge in one operator, against eager PyTorch and a copy of the kept tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from cases import Bar, Case, Settings, Shape, is_reference_run, main
from checks import check_prune_merge
from torch import Tensor

from diffrate_ext import ops

K_P, K_M = 168, 156  # block 3 of DeiT-S at 2.9 GFLOPs
COPY = "copy of the kept tokens"


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape, with_residual: bool) -> tuple[Any, ...]:
        x, residual = (settings.randn(shape.batch, shape.tokens, shape.channels) for _ in range(2))
        return x, settings.importance(shape), settings.sizes(shape), residual if with_residual else None

    def check(actual: Any, x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None) -> float:
        return check_prune_merge(actual, x, importance, K_P, K_M, size, residual=residual)

    for shape in settings.shapes:
        kept = shape.batch * K_M * shape.channels
        source, target = settings.randn(kept), settings.randn(kept)
        for with_residual in (False, True) if shape.model == "ViT-S" else (False,):
            judged = is_reference_run(settings, shape) and not with_residual
            read = shape.batch * K_P * shape.channels * (2 if with_residual else 1)
            yield Case(
                operator="prune_merge",
                label=shape.label + (" + residual" if with_residual else ""),
                shape=shape,
                ours=with_kept_numbers(ops.prune_merge),
                rivals={
                    "eager": with_kept_numbers(rivals.prune_merge),
                    "eager tuned": with_kept_numbers(rivals.prune_merge_tuned),
                },
                make_inputs=partial(inputs, shape, with_residual),
                check=check,
                moved=(read + kept) * settings.dtype.itemsize + shape.batch * (shape.tokens * (4 + 4 + 8) + K_M * 4),
                operations=2 * shape.batch * (K_P - K_M) * (K_M - 1) * shape.channels + 2 * read,
                bars=(Bar("eager", 10), Bar("eager tuned", 10), Bar(COPY, 1 / 4, "aim")) if judged else (),
                yardsticks={COPY: partial(copy, source, target)},
                compile_when_quick=judged,
            )


def with_kept_numbers(operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None) -> Any:
        return operator(x, importance, K_P, K_M, size, residual=residual)

    return call


def copy(source: Tensor, target: Tensor, *_: Any) -> Tensor:
    return target.copy_(source)


if __name__ == "__main__":
    main(cases)
