"""Compressed and uncompressed forms of one model side by side, without a second set of weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

from .compression import compress, restore
from .models.base import CompressedModule

if TYPE_CHECKING:
    from torch import nn

    from .schedule import Schedule

    Model = TypeVar("Model", bound=nn.Module)


def compressed_copy(model: Model, schedule: Schedule) -> Model:
    """A copy of ``model`` compressed by ``schedule``; ``model`` stays as it is.

    The copy has modules of its own and shares the parameters and buffers: comparing a large model with several
    compressed forms of itself takes the memory of one, and training either trains both.

    Raises:
        TypeError, ValueError: as :func:`diffrate_ext.compress`, for a model or schedule that does not fit.
    """
    return compress(_copy(model), schedule)


def uncompressed_copy(model: Model) -> Model:
    """A copy of ``model`` as it was before any compression, sharing its parameters and buffers."""
    plain = _copy(model)
    return restore(plain) if any(isinstance(module, CompressedModule) for module in plain.modules()) else plain


def _copy(model: Model) -> Model:
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
