"""add_norm: a sum and its layer normalization in one pass, against both as eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.nn.functional as F
from cases import Case, Settings, Shape, main
from checks import check_equal, check_function
from torch import Tensor

from diffrate_ext import ops, reference


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Tensor, Tensor, ops.Norm]:
        x, residual = (settings.randn(shape.batch, shape.tokens, shape.channels) for _ in range(2))
        return x, residual, ops.Norm(settings.randn(shape.channels), settings.randn(shape.channels), 1e-6)

    def check(actual: tuple[Tensor, Tensor], x: Tensor, residual: Tensor, norm: ops.Norm) -> float:
        check_equal("add_norm: x", actual[0], x + residual)
        return check_function("add_norm: normalized", reference.layer_norm, actual[1], (actual[0], *norm), {})

    for shape in settings.shapes:
        yield Case(
            operator="add_norm",
            label=shape.label,
            shape=shape,
            ours=ops.add_norm,
            rivals={"eager": eager},
            make_inputs=partial(inputs, shape),
            check=check,
            moved=4 * shape.batch * shape.tokens * shape.channels * settings.dtype.itemsize,
            operations=0,
        )


def eager(x: Tensor, residual: Tensor, norm: ops.Norm) -> tuple[Tensor, Tensor]:
    x = x + residual
    return x, F.layer_norm(x, x.shape[2:], *norm)


if __name__ == "__main__":
    main(cases)
