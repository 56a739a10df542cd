"""The README's picture, of a tiny model instead of the one that is downloaded."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import photograph
import pytest
from PIL import Image
from tiny_models import tiny_vit


def test_two_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = tiny_vit(num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    with zipfile.ZipFile(tmp_path / "pictures.whl", "w") as file:
        for name, colour in (("red.png", (255, 0, 0)), ("blue.png", (0, 0, 255))):
            data = BytesIO()
            Image.new("RGB", (60, 40), colour).save(data, "png")
            file.writestr(f"skimage/data/{name}", data.getvalue())
    monkeypatch.setattr(photograph, "dinov2", lambda package: model)
    monkeypatch.setattr(photograph, "wheel", lambda name, cache: zipfile.ZipFile(tmp_path / "pictures.whl"))
    output = tmp_path / "out.png"
    photograph.main(["--photographs", "red.png", "blue.png", "--blocks", "2", "4", "--output", str(output)])
    drawn = Image.open(output)
    assert drawn.mode == "P"
    assert abs(drawn.width - photograph.WIDTH) <= 1
    pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert pixels[0].min() > 250
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (np.abs(pixels.astype(int) - colour).max(-1) < 16).mean() > 0.02
    assert str(output) in capsys.readouterr().out


def test_the_picture_in_the_repository_fits_a_page() -> None:
    path = Path(photograph.__file__).parent / "results" / "photograph.png"
    picture = Image.open(path)
    assert picture.width == photograph.WIDTH
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # as the page around it
    assert path.stat().st_size < 700_000
