"""sort_tokens: argsort and gather in one pass, against both as eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from cases import Bar, Case, Settings, Shape, is_reference_run, main
from checks import check_sort_tokens

from diffrate_ext import ops


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Any, ...]:
        x = settings.randn(shape.batch, shape.tokens, shape.channels)
        return x, settings.importance(shape), settings.sizes(shape)

    for shape in settings.shapes:
        tokens = shape.batch * shape.tokens
        yield Case(
            operator="sort_tokens",
            label=shape.label,
            shape=shape,
            ours=ops.sort_tokens,
            rivals={"eager": rivals.sort_tokens, "eager tuned": rivals.sort_tokens_tuned},
            make_inputs=partial(inputs, shape),
            check=check_sort_tokens,
            moved=tokens * (2 * shape.channels * settings.dtype.itemsize + 3 * 4 + 8),
            operations=0,
            bars=(Bar("eager", 3), Bar("eager tuned", 3)) if is_reference_run(settings, shape) else (),
        )


if __name__ == "__main__":
    main(cases)
