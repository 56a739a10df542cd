"""Evaluation mode for a while, and who looks on while the code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_compiling


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within a ``with`` block the models are in evaluation mode; after it each module is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_transform() -> bool:
    """Whether a transform of torch.func, such as vmap, runs."""
    return not is_compiling() and maybe_current_level() is not None


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation runs, such as jvp."""
    return forward_ad._current_level >= 0  # compilers see it, too


def is_traced() -> bool:
    """Whether a compiler, a trace or a transform of torch.func looks on, or forward mode: plain steps alone will do."""
    return is_compiling() or torch.jit.is_tracing() or in_transform() or in_forward_mode()
