"""Model families that can be compressed: one file and one :class:`Adapter` each."""

from __future__ import annotations

from timm.models._features import FeatureGetterNet
from torch import nn

from ..errors import InputTypeError
from .adapter import Adapter, Stage, TokenRules
from .eva import EvaAdapter
from .hugging_face import HuggingFaceAdapter
from .metaformer import MetaFormerAdapter
from .vision_transformer import VisionTransformerAdapter

__all__ = ["Adapter", "Stage", "TokenRules", "adapter_for", "check_returns_logits"]

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
    elif isinstance(model, FeatureGetterNet):  # features_only=True
        hint = "; compress the model inside it, its .model"
    raise InputTypeError(
        f"{type(model).__name__} is not supported: expected one of timm's "
        f"{', '.join(adapter.family for adapter in OF_TIMM)}, or of transformers' {HuggingFaceAdapter.family}{hint}"
    )


def check_returns_logits(model: nn.Module, called: str) -> None:
    """Raise InputTypeError where a function, called so, cannot read what the model returns."""
    if not adapter_for(model).returns_logits:
        raise InputTypeError(
            f"{called} takes models that return logits or features as one tensor, and a {type(model).__name__} returns "
            "several by name: use compress, or RateSearch in a loop of your own (docs/models.md, Hugging Face)"
        )
