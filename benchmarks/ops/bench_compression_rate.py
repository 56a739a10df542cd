"""compression_rate, forward and backward: all proxies of a model, against loops over candidates in Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch
from cases import Bar, Case, Settings, Shape, main
from checks import check_function
from torch import Tensor

from diffrate_ext import ops, reference

PROXIES, PATCHES = 22, 196  # DeiT-S: pruning and merging in eleven blocks
LOOP = "loop over candidates"


def cases(settings: Settings) -> Iterator[Case]:
    if settings.dtype != torch.float32:
        return  # rates are float32 whatever the model is

    def inputs() -> tuple[Any, ...]:
        logits = settings.randn(PROXIES, PATCHES).requires_grad_()
        return logits, settings.randn(PROXIES), settings.randn(PROXIES, PATCHES + 1)

    def check(actual: tuple[Tensor, ...], *inputs: Any) -> float:
        return check_function("compression_rate", training(reference.compression_rate), actual, inputs, {})

    loop = training(rivals.compression_rate_loop)
    yield Case(
        operator="compression_rate",
        label=f"{PROXIES} proxies, {PATCHES} candidates, with gradients",
        shape=Shape("ViT-S", 1, 384, 6),
        ours=training(ops.compression_rate),
        # the loop is 4,312 small operations and as many backward: on a GPU launch gaps alone, a second at a time
        rivals={"eager": training(rivals.compression_rate), **({} if settings.on_gpu else {LOOP: loop})},
        make_inputs=inputs,
        check=check,
        moved=PROXIES * PATCHES * 5 * 4,
        operations=PROXIES * PATCHES * 10,
        bars=() if settings.on_gpu else (Bar(LOOP, 50),),
        trains=True,
    )


def training(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """kept, keep_probability, and the gradient of the logits."""

    def step(logits: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        results = operator(logits, PATCHES)
        (gradient,) = torch.autograd.grad(results, logits, gradients)
        return *(result.detach() for result in results), gradient

    return step


if __name__ == "__main__":
    main(cases)
