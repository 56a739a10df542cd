"""Model families that can be compressed: one file and one :class:`Adapter` each."""

from __future__ import annotations

from torch import nn

from .base import Adapter, Stage
from .metaformer import MetaFormerAdapter
from .vision_transformer import VisionTransformerAdapter

__all__ = ["ADAPTERS", "Adapter", "Stage", "adapter_for"]

ADAPTERS: tuple[Adapter, ...] = (VisionTransformerAdapter(), MetaFormerAdapter())


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the model's family.

    Raises:
        TypeError: no family knows the model.
        ValueError: the family knows it, but not one of its parts.
    """
    for adapter in ADAPTERS:
        if adapter.knows(model):
            adapter.check(model)
            return adapter
    hint = ""
    if hasattr(model, "_orig_mod") or hasattr(model, "module"):
        hint = "; compress the model first and wrap it (torch.compile, DistributedDataParallel) afterwards"
    raise TypeError(
        f"{type(model).__name__} is not supported: expected one of timm's "
        f"{', '.join(adapter.family for adapter in ADAPTERS)}{hint}"
    )
