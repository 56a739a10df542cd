"""prune_merge: sort, prune, match and merge in one operator, against eager PyTorch and a copy of the kept tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch.nn.functional as F
from cases import EAGER, FLOOR, Bar, Case, Settings, Shape, is_reference_run, main
from checks import check_prune_merge, check_prune_merge_norm
from torch import Tensor

from diffrate_ext import ops

K_P, K_M = 168, 156  # block 3 of DeiT-S at 2.9 GFLOPs
TUNED, COPY, APART = "eager tuned", "copy of the kept tokens", "norm apart"
RESIDUAL, NORM = " + residual", " + norm"


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape, extras: str) -> tuple[Any, ...]:
        x, residual = (settings.randn(shape.batch, shape.tokens, shape.channels) for _ in range(2))
        norm = ops.Norm(settings.randn(shape.channels), settings.randn(shape.channels), 1e-6)
        optional = residual if RESIDUAL in extras else None, norm if NORM in extras else None
        return x, settings.importance(shape), settings.sizes(shape), *optional

    def check(
        actual: Any, x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None, norm: ops.Norm | None
    ) -> float:
        arguments = (x, importance, K_P, K_M, size)
        if norm is None:
            return check_prune_merge(actual, *arguments, residual=residual)
        return check_prune_merge_norm(actual, norm, *arguments, residual=residual)

    for shape in settings.shapes:
        kept = shape.batch * K_M * shape.channels
        yardsticks: dict[str, Callable[..., Any]] = {}
        if not settings.on_gpu:  # there it would stay in the cache, and the floor says the same
            yardsticks[COPY] = partial(copy, settings.randn(kept), settings.randn(kept))
        for extras in ("", RESIDUAL, RESIDUAL + NORM) if shape.model == "ViT-S" else ("", RESIDUAL + NORM):
            reference_run = is_reference_run(settings, shape) and not extras
            bars: tuple[Bar, ...] = ()
            if reference_run:
                bars = Bar(EAGER, 10), Bar(TUNED, 10), Bar(COPY, 1 / 4, "aim")
            elif settings.judged_on_gpu and not extras:
                bars = Bar(FLOOR, 1 / 2), Bar(EAGER, 10), Bar(TUNED, 10)
            contenders = {EAGER: with_norm_apart(rivals.prune_merge), TUNED: with_norm_apart(rivals.prune_merge_tuned)}
            if NORM in extras:
                contenders[APART] = with_norm_apart(ops.prune_merge)
            read = shape.batch * K_P * shape.channels * (2 if RESIDUAL in extras else 1)
            written = kept * (2 if NORM in extras else 1)
            yield Case(
                operator="prune_merge",
                label=shape.label + extras,
                shape=shape,
                ours=fused,
                rivals=contenders,
                make_inputs=partial(inputs, shape, extras),
                check=check,
                moved=(read + written) * settings.dtype.itemsize + shape.batch * (shape.tokens * (4 + 4 + 8) + K_M * 4),
                operations=2 * shape.batch * (K_P - K_M) * (K_M - 1) * shape.channels + 2 * read,
                bars=bars,
                yardsticks=yardsticks,
                compile_when_quick=reference_run,
            )


def fused(
    x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None, norm: ops.Norm | None
) -> tuple[Tensor, ...]:
    return ops.prune_merge(x, importance, K_P, K_M, size, residual=residual, norm=norm)


def with_norm_apart(operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(
        x: Tensor, importance: Tensor, size: Tensor, residual: Tensor | None, norm: ops.Norm | None
    ) -> tuple[Tensor, ...]:
        merged = operator(x, importance, K_P, K_M, size, residual=residual)
        return merged if norm is None else (*merged, F.layer_norm(merged[0], (x.shape[2],), *norm))

    return call


def copy(source: Tensor, target: Tensor, *_: Any) -> Tensor:
    return target.copy_(source)


if __name__ == "__main__":
    main(cases)
