"""Picture files, and what the tests of loaders share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffrate_ext.images.sources import ImageSource, open_images

CLASSES = ["ant", "bee", "cow"]


class Model(nn.Module):
    """As much of a timm model as loaders look at."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (channels, 16, 16),
            "mean": (0.5,) * channels,
            "std": (0.25,) * channels,
            "crop_pct": 1.0,
        }


def write(path: Path, seed: int = 0, size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def colour(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(path)
    return path


def class_folders(root: Path, classes=CLASSES, each: int = 3) -> Path:
    for c, name in enumerate(classes):
        for i in range(each):
            write(root / name / f"{i}.png", seed=100 * c + i)
    return root


def flat(batches):
    """Every batch as a list of tensors, copied out of what the workers share."""
    return [[t.clone() for t in (batch if isinstance(batch, tuple) else (batch,))] for batch in batches]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for some, others in zip(found, expected, strict=True):
        assert len(some) == len(others)
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def damaged_pictures(folder: Path) -> ImageSource:
    """Eight grey pictures, of which 2, 3 and 7 cannot be read."""
    for i in range(8):
        colour(folder / "a" / f"{i}.png", 30 * i)
    for i in (2, 3, 7):
        (folder / "a" / f"{i}.png").write_text("no picture")
    return open_images(folder)


def brightness(batches) -> list[int]:
    return [round(float(v) * 255) for images, *_ in batches for v in (images * 0.25 + 0.5).mean((1, 2, 3))]


def warned(record) -> list[str]:
    return sorted(str(w.message) for w in record if "cannot be read" in str(w.message))
