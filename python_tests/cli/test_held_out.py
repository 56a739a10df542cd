"""The end of a search: learned against uniform on images that it did not learn from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import TEST_VIT, search
from PIL import Image

from diffrate_ext import Schedule, compressed_copy, embedded
from diffrate_ext.cli.common import consoles
from diffrate_ext.cli.held_out import hold_out
from diffrate_ext.cli.main import build_parser, main
from diffrate_ext.images.sources import open_images


def pictures(folder: Path, each: int, classes: tuple[str, ...] = ("n01440764", "n01443537")) -> Path:
    random = np.random.default_rng(2)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


def test_the_embedded_model_on_its_test_images(tmp_path: Path, capsys: Any) -> None:
    assert main(search(tmp_path / "found", "--held-out", "40", "--gflops", "0.25", "0.2")) == 0
    out = capsys.readouterr().out
    assert out.count("GFLOPs on 40 images that were not learned from (the embedded test images):") == 2
    for line in ("learned", "uniform"):
        assert len(re.findall(rf"  {line}: loss \d\.\d{{4}}, top-1 \d+\.\d\d%, agreement \d+\.\d\d%", out)) == 2
    verdict = r"  learned - uniform: loss [+-]\d\.\d{4} \(95 % interval [+-]\S+ to [+-]\S+\): "
    assert len(re.findall(verdict + "(learned is better|UNIFORM IS BETTER|no difference beyond chance)", out)) == 2
    images, labels = embedded.load_images("test")
    schedule = Schedule.load(tmp_path / "found" / "0.25G" / "schedule.json")
    with torch.no_grad():
        logits = compressed_copy(embedded.load_model(), schedule)(embedded.normalize(images[::50]))
    assert f"learned: loss {F.cross_entropy(logits, labels[::50]):.4f}" in out


def test_pictures_without_a_validation_part_give_up_a_tenth(tmp_path: Path, capsys: Any) -> None:
    images = pictures(tmp_path / "pictures", 10)
    argv = search(tmp_path / "found", *TEST_VIT, "--images", str(images), "--gflops", "0.025", "--held-out", "9")
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "2 of 20 images are kept for a comparison at the end" in captured.err
    assert f"0.025 GFLOPs on 2 images that were not learned from ({images})" in captured.out
    assert main([*argv, "--resume"]) == 0  # the same are kept
    assert main([*argv[:-1], "0", "--resume"]) == 2
    assert "number of images: 18 then, 20 now" in capsys.readouterr().err


def test_what_is_kept_is_not_trained_on(tmp_path: Path) -> None:
    images = open_images(pictures(tmp_path / "pictures", 10))
    arguments = build_parser().parse_args(["search", *TEST_VIT, "--images", images.where])
    training, kept = hold_out(arguments, images, embedded.build_model(), consoles()[1])
    assert kept is not None
    names = [{part.name(i) for i in range(len(part))} for part in (training, kept, images)]
    assert len(names[0]) == 18
    assert not names[0] & names[1]
    assert names[0] | names[1] == names[2]
    assert [kept.read(i)[1] for i in range(2)] == [0, 1]  # spread over the classes


@pytest.mark.parametrize("learned_from", ["train", "val"])
def test_a_validation_part_is_used(learned_from: str, tmp_path: Path, capsys: Any) -> None:
    for part in ("train", "val"):
        pictures(tmp_path / "pictures" / part, 3)
    argv = search(tmp_path / "found", *TEST_VIT, "--images", str(tmp_path / "pictures"), "--gflops", "0.025")
    assert main([*argv, "--split", learned_from, "--held-out", "5"]) == 0
    captured = capsys.readouterr()
    where = tmp_path / "pictures" / "val"
    assert (f"5 images that were not learned from ({where})" in captured.out) == (learned_from == "train")
    assert ("too few images" in captured.err) == (learned_from == "val")


def test_pictures_without_labels(tmp_path: Path, capsys: Any) -> None:
    images = pictures(tmp_path / "pictures", 20, classes=(".",))
    argv = search(tmp_path / "found", *TEST_VIT, "--images", str(images), "--gflops", "0.025", "--soft-targets")
    assert main([*argv, "--held-out", "100"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"  learned: loss \d+\.\d{4}, agreement", out)
    assert "top-1" not in out


def test_the_history_says_what_it_measured(tmp_path: Path) -> None:
    """By names for those who did not write it, one list of numbers to a line."""
    assert main(search(tmp_path / "hard", "--no-soft-targets")) == 0
    assert main(search(tmp_path / "soft", "--soft-targets")) == 0
    for folder, measure in (("hard", "accuracy"), ("soft", "agreement")):
        text = (tmp_path / folder / "history.json").read_text()
        record = json.loads(text)["records"][0]
        assert list(record)[:6] == ["step", "loss", "flops_loss", measure, "gflops", "learning_rate"]
        lines = text.splitlines()
        assert '      "step": 0,' in lines
        numbers = ", ".join(map(str, record["tokens_after_merging"]))
        assert f'      "tokens_after_merging": [{numbers}]' in lines
