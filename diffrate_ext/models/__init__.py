"""Model families that can be compressed: one file and one :class:`Adapter` each."""

from __future__ import annotations

from torch import nn

from ..errors import InputTypeError
from .adapter import Adapter, Stage, TokenRules
from .eva import EvaAdapter
from .hugging_face import HuggingFaceAdapter
from .metaformer import MetaFormerAdapter
from .vision_transformer import VisionTransformerAdapter

__all__ = ["Adapter", "Stage", "TokenRules", "adapter_for"]

OF_TIMM: tuple[type[Adapter], ...] = (VisionTransformerAdapter, EvaAdapter, MetaFormerAdapter)
ADAPTERS: tuple[type[Adapter], ...] = (*OF_TIMM, HuggingFaceAdapter)


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
    else:
        for name, part in model.named_modules():
            if any(adapter.knows(part) for adapter in ADAPTERS):
                hint = f". Its {name} is one, a {type(part).__name__}: take that"
                break
    raise InputTypeError(
        f"{type(model).__name__} is not supported: expected one of timm's "
        f"{', '.join(adapter.family for adapter in OF_TIMM)}, or of transformers' {HuggingFaceAdapter.family}{hint}"
    )
