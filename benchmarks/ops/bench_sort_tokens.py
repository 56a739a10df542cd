"""sort_tokens: argsort and gather in one pass, against both as eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch
from cases import Bar, Case, Settings, Shape, is_reference_run, main, with_gradient
from checks import check_function, check_sort_tokens

from diffrate_ext import ops, reference


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Any, ...]:
        x = settings.randn(shape.batch, shape.tokens, shape.channels)
        return x, settings.importance(shape), settings.sizes(shape)

    def training_inputs(shape: Shape) -> tuple[Any, ...]:
        x, *rest = inputs(shape)
        return torch.randn_like(x), x.requires_grad_(), *rest

    def check_training(actual: tuple[Any, ...], *inputs: Any) -> float:
        return check_function("sort_tokens", with_gradient(reference.sort_tokens), actual, inputs, {})

    for shape in settings.shapes:
        tokens = shape.batch * shape.tokens
        forward = tokens * (2 * shape.channels * settings.dtype.itemsize + 3 * 4 + 8)
        yield Case(
            operator="sort_tokens",
            label=shape.label,
            shape=shape,
            ours=ops.sort_tokens,
            rivals={"eager": rivals.sort_tokens, "eager tuned": rivals.sort_tokens_tuned},
            make_inputs=partial(inputs, shape),
            check=check_sort_tokens,
            moved=forward,
            operations=0,
            bars=(Bar("eager", 3), Bar("eager tuned", 3)) if is_reference_run(settings, shape) else (),
        )
        if settings.on_gpu:
            yield Case(
                operator="sort_tokens",
                label=f"{shape.label}, with gradients",
                shape=shape,
                ours=with_gradient(ops.sort_tokens),
                rivals={"eager": with_gradient(rivals.sort_tokens)},
                make_inputs=partial(training_inputs, shape),
                check=check_training,
                moved=2 * forward,
                operations=0,
                trains=True,
            )


if __name__ == "__main__":
    main(cases)
