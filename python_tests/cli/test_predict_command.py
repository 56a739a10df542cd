"""``diffrate predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import TEST_VIT, assert_is_a_drawing, fails, rows

from diffrate_ext import compressed_copy, embedded, uniform_schedule
from diffrate_ext.cli.main import main
from diffrate_ext.images.loading import transform_for
from diffrate_ext.images.pictures import read_picture


def shown(out: str) -> list[list[str]]:
    """The classes in each row: before and after."""
    return [[first, *rest] for first, rest in rows(out).items()]


def test_the_embedded_model(tmp_path: Path, capsys: Any) -> None:
    assert main(["predict", "--top", "2", "--output", str(tmp_path / "tokens.png")]) == 0
    out = capsys.readouterr().out
    assert "uniform 60%" in out
    assert "0.211 of 0.351 GFLOPs" in out
    model, image = embedded.load_model(), embedded.normalize(embedded.load_images("test")[0][:1])
    with torch.no_grad():
        for column, form in enumerate((model, compressed_copy(model, uniform_schedule(model, "60%")))):
            found = form(image).softmax(1)[0].topk(2)
            expected = [
                f"{share:.1%}  {embedded.CLASSES[i]}"
                for share, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)
            ]
            assert [row[column] for row in shown(out)] == expected
    assert_is_a_drawing(tmp_path / "tokens.png")


def test_a_picture_and_imagenets_classes(folder: Path, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    with torch.no_grad():
        model.head.bias[2] += 9  # a great white shark
        image = transform_for(model, augment=False)(read_picture(folder / "a.png"))[None]
        assert model(image).argmax() == 2
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    uniform_schedule(model, 0.02, method="tome").save(tmp_path / "mine.json")
    argv = ["predict", "--model", "test_vit", "--weights", str(tmp_path / "weights.pth")]
    argv += ["--image", str(folder / "a.png"), "--schedule", str(tmp_path / "mine.json")]
    assert main([*argv, "--output", str(tmp_path / "tokens.png")]) == 0
    out = capsys.readouterr().out
    assert len(shown(out)) == 5
    assert all(cell.endswith("great white shark") for cell in shown(out)[0])
    assert "tome mine.json" in out
    assert "test_vit, a.png" in out


@pytest.mark.parametrize(("gflops", "name"), [("0.8", "published 0.8 GFLOPs"), ("70%", "uniform 70%")])
def test_it_says_which_schedule_it_took(gflops: str, name: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["predict", "--model", "deit_tiny_patch16_224", "--no-pretrained", "--image", str(folder / "a.png")]
    assert main([*argv, "--gflops", gflops, "--output", str(tmp_path / "tokens.png")]) == 0
    captured = capsys.readouterr()
    assert name in captured.out
    assert "Random weights" in captured.err


def test_a_model_without_classes(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    from diffrate_ext.cli import workload

    monkeypatch.setattr(workload, "model_named", lambda _: timm.create_model("test_vit", num_classes=0))
    error = fails(["predict", *TEST_VIT, "--image", str(folder / "a.png")], capsys)
    assert "test_vit (random weights) has no classes to predict; diffrate visualize draws its tokens" in error
