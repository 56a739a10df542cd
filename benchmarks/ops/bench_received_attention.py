"""received_attention: column means without the N x N map, against the map in eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from cases import Case, Settings, Shape, main
from checks import check_function
from torch import Tensor

from diffrate_ext import ops, reference


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Any, ...]:
        q, k, _ = settings.qkv(shape)
        return q, k, settings.sizes(shape)

    def check(actual: Tensor, *inputs: Any) -> float:
        return check_function("received_attention", reference.received_attention, actual, inputs, {})

    for shape in settings.shapes:
        elements = shape.batch * shape.tokens * shape.channels
        yield Case(
            operator="received_attention",
            label=shape.label,
            shape=shape,
            ours=ops.received_attention,
            rivals={"eager": rivals.received_attention},
            make_inputs=partial(inputs, shape),
            check=check,
            moved=2 * elements * settings.dtype.itemsize + shape.batch * shape.tokens * 8,
            operations=2 * elements * shape.tokens,
        )


if __name__ == "__main__":
    main(cases)
