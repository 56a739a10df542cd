"""The comparison on DINOv2, without what it downloads."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import dinov2
import numpy as np
import pytest
import torch
from machine import describe
from PIL import Image
from tiny_models import tiny_images, tiny_vit

from diffrate_ext import compare, flops

CPU = torch.device("cpu")
NAMES = ("a.png", "b.jpg")


@pytest.fixture
def package(tmp_path: Path) -> zipfile.ZipFile:
    """Two pictures, of one colour each, as scikit-image's wheel has them."""
    with zipfile.ZipFile(tmp_path / "pictures.whl", "w") as file:
        for value, name in enumerate(NAMES):
            data = BytesIO()
            pixels = np.full((40, 60, 3), 200 * value, dtype=np.uint8)
            Image.fromarray(pixels).save(data, "png" if name.endswith("png") else "jpeg")
            file.writestr(f"skimage/data/{name}", data.getvalue())
    return zipfile.ZipFile(tmp_path / "pictures.whl")


def model() -> Any:
    model = tiny_vit(num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    return model


def test_crops_of_all_pictures_in_turn(package: zipfile.ZipFile) -> None:
    vit, before = model(), torch.get_rng_state()
    found = dinov2.crops(vit, package, NAMES, 3, seed=0)
    assert found.shape == (6, 3, 16, 16)
    assert (found.mean((1, 2, 3)) > 0).tolist() == [False, True] * 3
    assert torch.equal(found, dinov2.crops(vit, package, NAMES, 3, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_picture_is_learned_from_and_shown() -> None:
    assert not set(dinov2.SHOWN) & set(dinov2.LEARNED_FROM)


def test_a_schedule_is_learned(package: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "LEARNED_FROM", NAMES)
    vit = model()
    target = 0.75 * flops(vit) / 1e9
    schedule = dinov2.learn(vit, package, target, 3)
    assert flops(vit, schedule) / 1e9 == pytest.approx(target, rel=0.1)


def test_the_page_has_a_row_for_every_method() -> None:
    vit = model()
    rows = compare(vit, [tiny_images(vit)], [0.75 * flops(vit) / 1e9], rounds=1, batch_size=2)
    records = [dinov2.record(row) for row in rows]
    content = {"machine": describe(CPU), "images": 3, "steps": 60, "batch": 8, "records": records}
    lines = dinov2.page(content).splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    assert [line.split(" | ")[0].strip("| ") for line in table] == ["diffrate", "tome", "evit", "random"]
    assert f"{1e4 * (1 - rows[1].cosine):.1f}" in table[0]
    assert any("3 crops of 9 photographs" in line for line in lines)
