"""``diffrate train-predictors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import TEST_VIT, fails

from diffrate_ext import compressed_copy, uniform_schedule
from diffrate_ext.cli.main import main
from diffrate_ext.embedded import load_model
from diffrate_ext.methods import DynamicViT, Predictors

QUICK = ["train-predictors", "--steps", "1", "--batch-size", "2"]


def test_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.safetensors"
    assert main([*QUICK, "--output", str(file)]) == 0
    captured = capsys.readouterr()
    assert "0.1755 GFLOPs, 1 steps" in captured.out
    assert str(file) in captured.out
    assert captured.err.startswith("predictors  step 1/1  loss ")
    model, method = load_model(), DynamicViT(file)
    compressed = compressed_copy(model, uniform_schedule(model, 0.2, method=method), method=method)
    with torch.no_grad():
        assert compressed(torch.randn(1, 1, 28, 28)).isfinite().all()
    assert main([*QUICK, "--output", str(tmp_path / "other.safetensors"), "--seed", "1"]) == 0
    one, other = Predictors.load(file).state_dict(), Predictors.load(tmp_path / "other.safetensors").state_dict()
    assert not torch.equal(one["of_block.3.embed.weight"], other["of_block.3.embed.weight"])


def test_the_users_pictures(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    assert main([*QUICK, *TEST_VIT, "--images", str(folder), "--gflops", "0.02", "--output", str(file)]) == 0
    predictors = Predictors.load(file)
    model: Any = timm.create_model("test_vit")
    assert (predictors.depth, predictors.channels) == (len(model.blocks), model.embed_dim)
    assert str(predictors.model).startswith("test_vit")


def test_errors(tmp_path: Path, capsys: Any) -> None:
    assert "--model needs --images FOLDER" in fails([*QUICK, *TEST_VIT], capsys)
    assert "--images needs --model NAME" in fails([*QUICK, "--images", str(tmp_path)], capsys)
    assert "cannot be reached" in fails([*QUICK, "--gflops", "9", "--output", str(tmp_path / "x")], capsys)
    assert "there is no folder" in fails([*QUICK, "--output", str(tmp_path / "no" / "x")], capsys)
