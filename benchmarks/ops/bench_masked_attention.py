"""masked_attention, forward and backward, against explicit attention maps in eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
import torch
from cases import EAGER, PEAK_MEMORY, Bar, Case, Settings, Shape, main
from checks import check_function
from torch import Tensor

from diffrate_ext import ops, reference


def cases(settings: Settings) -> Iterator[Case]:
    def inputs(shape: Shape) -> tuple[Any, ...]:
        q, k, v = settings.qkv(shape)
        # a quarter of the tokens is masked already, the class token is not
        mask = (torch.rand(shape.batch, shape.tokens, device=settings.device) < 0.75).float()
        mask[:, 0] = 1
        gradient = settings.randn(shape.batch, shape.tokens, shape.heads, shape.head_dim).transpose(1, 2)
        return gradient, *(tensor.requires_grad_() for tensor in (q, k, v, mask)), settings.sizes(shape)

    def check(actual: tuple[Tensor, ...], *inputs: Any) -> float:
        return check_function("masked_attention", training(reference.masked_attention), actual, inputs, {})

    for shape in settings.search_shapes:
        elements = shape.batch * shape.tokens * shape.channels
        yield Case(
            operator="masked_attention",
            label=f"{shape.label}, with gradients",
            shape=shape,
            ours=training(ops.masked_attention),
            rivals={EAGER: training(rivals.masked_attention)},
            make_inputs=partial(inputs, shape),
            check=check,
            # q, k and v are read twice; the products with N x N maps: two forward, and five backward
            moved=(6 + 1 + 1 + 3) * elements * settings.dtype.itemsize,
            operations=14 * elements * shape.tokens,
            bars=bars(settings, shape),
            trains=True,
            own_scratch=0 if settings.on_gpu else backward_scratch(shape),
        )


def bars(settings: Settings, shape: Shape) -> tuple[Bar, ...]:
    if (settings.quick and settings.on_gpu) or shape.model != "ViT-S":
        return ()
    if settings.on_gpu:
        return Bar(EAGER, 3), Bar(f"{EAGER}{PEAK_MEMORY}", 3)
    if settings.dtype == torch.float32:
        return Bar(EAGER, 2), Bar(f"{EAGER}, beyond results{PEAK_MEMORY}", 3)
    return ()


def backward_scratch(shape: Shape) -> int:
    """Bytes that the backward kernel takes for itself (csrc/cpu/masked_attention.cpp, Scratch), on all threads."""
    tokens, channels = -(-shape.tokens // 16) * 16, -(-shape.head_dim // 16) * 16
    queries = 96
    by_head = 2 * shape.head_dim * tokens + 3 * shape.tokens * channels  # q, k, v and gradients, repacked
    by_block = 3 * queries * channels + 2 * queries * tokens
    shared = (2 + shape.heads) * tokens
    return 4 * torch.get_num_threads() * (by_head + by_block + shared)


def training(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """out, importance, and the gradients of q, k, v and the mask."""

    def step(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        out, importance = operator(*inputs)
        return out.detach(), importance, *torch.autograd.grad(out, inputs[:4], gradient)

    return step


if __name__ == "__main__":
    main(cases)
