"""The benchmark of dense features, on a tiny model and on one whose answers are known."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dense_features
import pytest
import torch
from PIL import Image
from tiny_models import tiny_vit
from torch import Tensor


class Pixels:
    """A model whose features are the pixels themselves."""

    patch_embed = SimpleNamespace(grid_size=(4, 6))

    def forward_intermediates(self, images: Tensor, **_: Any) -> list[Tensor]:
        return [images.flatten(2).transpose(1, 2)]


def test_what_is_matched_and_nearly_matched() -> None:
    images = torch.eye(24).reshape(1, 24, 4, 6)  # every patch unlike the others
    assert dense_features.matched(Pixels(), images) == (1.0, 1.0)
    images[..., 0, :] = images[..., 1, :]  # two rows alike: the first one is chosen, in place and one row too high
    right, near = dense_features.matched(Pixels(), images)
    assert right == pytest.approx(18 / 24)
    assert near == 1.0


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_vit(num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    with zipfile.ZipFile(tmp_path / "pictures.whl", "w") as file:
        Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "noise.png")
        for name in dense_features.SHOWN:
            file.write(tmp_path / "noise.png", f"skimage/data/{name}")
    monkeypatch.setattr(dense_features, "dinov2", lambda package: model)
    monkeypatch.setattr(dense_features, "wheel", lambda name, cache: zipfile.ZipFile(tmp_path / "pictures.whl"))
    dense_features.main(["--crops", "1", "--shares", "80%", "--output", str(tmp_path / "page.md")])
    rows = (tmp_path / "page.md").read_text().splitlines()[4:]
    assert [row.split(" | ")[:3] for row in rows[2:]] == [
        ["| 100%", "uncompressed", ""],
        ["| 80%", "diffrate", "last"],
        ["| 80%", "diffrate", "nearest"],
        ["| 80%", "diffrate", "zeros"],
        ["| 80%", "tome", ""],
    ]
