"""Searches on tiny models of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.metaformer import MetaFormer
from tiny_models import tiny_caformer, tiny_eva, tiny_vit
from torch import Tensor, nn

from diffrate_ext import RateSearch

KINDS: dict[str, Callable[[], nn.Module]] = {
    "class token": tiny_vit,
    "registers": lambda: tiny_vit(reg_tokens=3),
    "layer scale": lambda: tiny_vit(init_values=0.3),
    "q/k norm": lambda: tiny_vit(qk_norm=True),
    "any image size": lambda: tiny_vit(dynamic_img_size=True),
    "distilled": lambda: tiny_vit(VisionTransformerDistilled),
    "mean pool": lambda: tiny_vit(global_pool="avg"),
    "mean pool over the prefix too": lambda: tiny_vit(global_pool="avg", pool_include_prefix=True),
    "no class token": lambda: tiny_vit(global_pool="avg", class_token=False),
    "only registers": lambda: tiny_vit(global_pool="avg", class_token=False, reg_tokens=2),
    "attention pool": lambda: tiny_vit(global_pool="map", class_token=False),
    "attention pool with class token": lambda: tiny_vit(global_pool="map"),
    "max pool": lambda: tiny_vit(global_pool="max"),
    "mean and max pool": lambda: tiny_vit(global_pool="avgmax", class_token=False),
    "rotary": tiny_eva,
    "rotary by block and head": lambda: tiny_eva("rotary by block and head"),
    "rotary, mean pool": lambda: tiny_eva("rotary, mean pool"),
    "CAFormer": tiny_caformer,
}


def build(kind: str = "class token") -> nn.Module:
    return KINDS[kind]()


def searching(model: nn.Module, merging: bool = True, granularity: int = 1, **options: Any) -> RateSearch:
    """A search, not at its beginning: every block prunes some, and merges some more of what is left."""
    rates = RateSearch(model, granularity, **options)
    candidates = torch.arange(rates.n_patches, 0, -granularity)
    in_order = (rates.prune_logits, rates.merge_logits)
    first, last = in_order[::-1] if rates.method.merges_first else in_order
    with torch.no_grad():
        for logits, most in ((first, 13.5), (last, 12.0)):
            if logits is None:
                continue
            for row in range(len(logits)):
                patches = 16 if logits is rates.merge_logits and not merging else most - 3.5 * row
                logits[row] = -(candidates - patches).abs()
    return rates


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % 5)


def proxies_of(rates: RateSearch) -> list[nn.Parameter]:
    return [logits for logits in (rates.prune_logits, rates.merge_logits) if logits is not None]


def pools_over_patches(model: Any) -> bool:
    return isinstance(model, MetaFormer) or model.global_pool != "token"
