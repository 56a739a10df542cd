"""Compressed and uncompressed forms of one model side by side, without a second set of weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from ..methods import Method
from ..models.classes import CompressedModule
from ..schedule import Schedule
from .compress import compress
from .patching import remove_plans

Model = TypeVar("Model", bound=nn.Module)


def compressed_copy(model: Model, schedule: Schedule, *, method: str | Method | None = None) -> Model:
    """A copy of ``model`` compressed by ``schedule`` and a method; ``model`` stays as it is.

    The copy has modules of its own and shares the parameters and buffers: comparing a large model with several
    compressed forms of itself takes the memory of one, and training either trains both.

    Raises:
        InputTypeError, InputValueError: as :func:`diffrate_ext.compress`, for a model or schedule that does not fit.
    """
    return compress(uncompressed_copy(model), schedule, method=method)


def uncompressed_copy(model: Model) -> Model:
    """A copy of ``model`` as it was before any compression, sharing its parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    compressed = [module for module in model.modules() if isinstance(module, CompressedModule)]
    # a plan may hold a rate search, which is not to be copied, and what it froze is not the copy's to release
    plans = [module.__dict__["_diffrate_plan"] for module in compressed if "_diffrate_plan" in module.__dict__]
    shared |= {id(plan): plan for plan in plans}
    plain = copy.deepcopy(model, shared)
    if compressed:
        remove_plans(plain, release=False)
    return plain
