"""The golden cases with the models, weights and images they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate_ext.schedule import Schedule

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    meta: dict[str, Any]
    arrays: dict[str, Tensor]
    model: nn.Module
    images: Tensor

    @property
    def schedule(self) -> Schedule:
        """The kept numbers of an ``eval`` case."""
        prune = self.meta.get("prune")
        return Schedule(prune, self.meta["merge"], prefix=0 if prune is None else 1)


def load_case(name: str, device: torch.device | None = None) -> GoldenCase:
    with np.load(FOLDER / f"{name}.npz") as archive:
        meta = json.loads(str(archive["meta"]))
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
    if "cfg" in meta:
        model: nn.Module = VisionTransformer(**meta["cfg"])
        model.load_state_dict(_random_weights(model, meta["seed"]))
        image_size = meta["cfg"]["img_size"]
    else:
        model = MetaFormer(
            num_classes=meta["num_classes"],
            depths=meta["depths"],
            dims=meta["dims"],
            token_mixers=[SepConv, SepConv, Attention, Attention],
            norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        )
        model.load_state_dict({key.removeprefix("weight."): arrays[key] for key in arrays if key.startswith("weight.")})
        image_size = 224
    images = np.random.RandomState(meta["seed"] + 1).standard_normal((len(arrays["logits"]), 3, image_size, image_size))
    arrays = {key: array.to(device) for key, array in arrays.items()}
    return GoldenCase(meta, arrays, model.eval().to(device), torch.from_numpy(images).float().to(device))


def _random_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The weights that were drawn when the golden outputs were made, in the order they were drawn."""
    random = np.random.RandomState(seed)
    state = model.state_dict()
    for name in sorted(state):
        shape = tuple(state[name].shape)
        drawn = random.standard_normal(shape).astype(np.float32)
        if name in ("pos_embed", "cls_token"):
            drawn = 0.5 * random.standard_normal(shape).astype(np.float32)
        elif "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        elif len(shape) >= 2:
            drawn = drawn * 1.5 / np.sqrt(np.prod(shape[1:]))
        else:
            drawn = 0.1 * drawn
        state[name] = torch.from_numpy(np.asarray(drawn, dtype=np.float32))
    return state
