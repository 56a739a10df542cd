"""proportional_attention: fused attention with log-size bias and importance, against explicit attention maps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch.nn.functional as F
from cases import Bar, Case, Settings, Shape, main
from checks import check_function
from harness import GRAPH
from torch import Tensor

from diffrate_ext import ops, reference

FUSED = "fused attention alone"


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Any, ...]:
        return (*settings.qkv(shape), settings.sizes(shape))

    def check(actual: tuple[Tensor, Tensor], *inputs: Any) -> float:
        return check_function("proportional_attention", reference.proportional_attention, actual, inputs, {})

    more = []
    if settings.judged_on_gpu:  # the ends of the range that the bar is meant for
        more = [Shape("64 tokens", 256, 384, 6, 64), Shape("577 tokens", 256, 768, 12, 577)]
    for shape in (*settings.shapes, *more):
        elements = shape.batch * shape.tokens * shape.channels
        yield Case(
            operator="proportional_attention",
            label=shape.label,
            shape=shape,
            ours=ops.proportional_attention,
            rivals={"eager": rivals.proportional_attention},
            make_inputs=partial(inputs, shape),
            check=check,
            moved=4 * elements * settings.dtype.itemsize + shape.batch * shape.tokens * 8,
            operations=4 * elements * shape.tokens,
            bars=(Bar(f"{FUSED}, {GRAPH}", 1 / 1.1),) if settings.judged_on_gpu else (),
            yardsticks={FUSED: fused_attention},
        )


def fused_attention(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """What an uncompressed model pays: no sizes, no importance."""
    return F.scaled_dot_product_attention(q, k, v)


if __name__ == "__main__":
    main(cases)
