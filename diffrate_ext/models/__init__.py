"""Model families that can be compressed: one file and one :class:`Adapter` each."""

from __future__ import annotations

from torch import nn

from ..errors import InputTypeError
from .adapter import Adapter, Stage, TokenRules
from .eva import EvaAdapter
from .metaformer import MetaFormerAdapter
from .vision_transformer import VisionTransformerAdapter

__all__ = ["Adapter", "Stage", "TokenRules", "adapter_for"]

ADAPTERS: tuple[type[Adapter], ...] = (VisionTransformerAdapter, EvaAdapter, MetaFormerAdapter)


def adapter_for(model: nn.Module) -> Adapter:
    """The model's adapter.

    Raises:
        InputTypeError: no family knows the model.
        InputValueError: the family knows it, but not one of its parts.
    """
    for adapter in ADAPTERS:
        if adapter.knows(model):
            return adapter(model)
    hint = ""
    if hasattr(model, "_orig_mod") or hasattr(model, "module"):
        hint = "; compress the model first and wrap it (torch.compile, DistributedDataParallel) afterwards"
    raise InputTypeError(
        f"{type(model).__name__} is not supported: expected one of timm's "
        f"{', '.join(adapter.family for adapter in ADAPTERS)}{hint}"
    )
