"""bipartite_match: ToMe's matching of the keys' means over heads, against the same in eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from cases import Case, Settings, Shape, main
from checks import check_bipartite_match
from torch import Tensor

from diffrate_ext import ops

MERGED = 13  # a block's in ViT-B at a third less work


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Tensor]:
        return (settings.qkv(shape)[1],)

    def check(actual: Tensor, keys: Tensor) -> float:
        return check_bipartite_match(actual, keys, MERGED)

    for shape in settings.shapes:
        elements = shape.batch * shape.tokens * shape.channels
        pairs = shape.batch * (shape.tokens // 2) ** 2
        yield Case(
            operator="bipartite_match",
            label=shape.label,
            shape=shape,
            ours=with_merged(ops.bipartite_match),
            rivals={"eager": with_merged(rivals.bipartite_match)},
            make_inputs=partial(inputs, shape),
            check=check,
            moved=elements * settings.dtype.itemsize + shape.batch * shape.tokens * 8,
            operations=elements + 2 * pairs * shape.head_dim,
        )


def with_merged(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(keys: Tensor) -> Tensor:
        return operator(keys, MERGED)

    return call


if __name__ == "__main__":
    main(cases)
