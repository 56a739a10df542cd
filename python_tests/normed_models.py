"""Compressed models whose norms are not ones and zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny_models import tiny_caformer, tiny_schedule, tiny_vit
from torch import nn

from diffrate_ext import compress

NORMED: dict[str, Callable[[], nn.Module]] = {
    "class token": tiny_vit,
    "mean pool": lambda: tiny_vit(global_pool="avg", class_token=False),
    "layer scale": lambda: tiny_vit(init_values=0.3),
    "CAFormer": tiny_caformer,  # norms without a bias
}


def compressed_of(kind: str) -> Any:
    model = NORMED[kind]()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return compress(model, tiny_schedule(model))
