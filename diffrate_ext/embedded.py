"""The small Vision Transformer and the pictures that come with the package.

They make the demo, the tests and the quick benchmarks real without a download: a ViT of 12 blocks on 197 tokens
(28 x 28 pixels, patch 2, one class token), the token count of DeiT and of the published schedules, trained on
Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT licence) by ``scripts/train_embedded.py``.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from .errors import InputValueError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

NAME = "vit_embedded_fashion_mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, pixels in [0, 1]

SEARCH_STEPS = 100
SEARCH_SHARE = 0.6  # of the uncompressed model's FLOPs

_DATA = resources.files("diffrate_ext") / "data"


def build_model() -> VisionTransformer:
    """The embedded architecture with random weights: 1.36 M parameters, 0.35 GFLOPs."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=28, patch_size=2, in_chans=1, num_classes=len(CLASSES), embed_dim=96, depth=12, num_heads=3
    )
    config: Any = {
        "architecture": NAME,
        "input_size": (1, 28, 28),
        "mean": (MEAN,),
        "std": (STD,),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": len(CLASSES),
    }
    model.pretrained_cfg = config  # from here timm's resolve_data_config takes size, mean and std
    return model


def load_model(weights: str | Path | None = None) -> VisionTransformer:
    """The embedded model with its trained weights, in evaluation mode, float32.

    Args:
        weights: a file of others, such as a fine-tuning leaves.

    Raises:
        FileNotFoundError: there is no such file.
        InputValueError: they are not the embedded model's.
    """
    model = build_model()
    if weights is not None:
        _load_others(model, Path(weights))
        return model.eval()
    with resources.as_file(_DATA / "embedded.safetensors") as path:
        state = load_file(path)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def _load_others(model: VisionTransformer, path: Path) -> None:
    from timm.models import load_checkpoint

    if not path.is_file():
        raise FileNotFoundError(f"no such file of weights: {path}")
    try:
        load_checkpoint(model, str(path))
    except Exception as error:  # torch and safetensors raise errors of their own on files that are damaged or of others
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputValueError(f"the weights {path} do not load into the embedded model: {words}") from error


def load_images(split: Literal["search", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labelled embedded images, the same number of each class.

    ``"search"``: 1,000 training images, to learn or choose a schedule on. ``"test"``: 2,000 test images, which the
    model never saw, to report on.

    Returns:
        images (n, 1, 28, 28) uint8 and labels (n,) int64.
    """
    if split not in ("search", "test"):
        raise InputValueError(f"split must be 'search' or 'test', got {split!r}")
    with resources.as_file(_DATA / f"{split}_images.npz") as path, np.load(path) as archive:
        return torch.from_numpy(archive["images"])[:, None], torch.from_numpy(archive["labels"]).long()


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (n, 1, 28, 28) as the float32 input of the embedded model."""
    return images.float().div_(255).sub_(MEAN).div_(STD)
