"""What a model expects of its images, by timm's configuration of it."""

from __future__ import annotations

from typing import Any

from torch import nn


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model: input size (C, H, W), mean, standard deviation, interpolation, crop."""
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    # a model made for another image size than its weights knows that in its patch embedding only
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:  # transformers' models
        side = getattr(getattr(model, "config", None), "image_size", None)
        size = (side, side) if isinstance(side, int) else side
    if size:
        config["input_size"] = (config["input_size"][0], *size)
    return config
