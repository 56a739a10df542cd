"""A search in two processes under torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import torchrun

from diffrate_ext.cli.main import main
from diffrate_ext.schedule import Schedule

SEARCH = ["search", "--model", "test_vit", "--no-pretrained", "--steps", "8", "--workers", "0", "--lr", "0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 labelled pictures: as many classes as the model has would be 1,000, so the labels are not used."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((170, 170)).save(
            folder / f"{i}.png"
        )
    return folder


def test_two_processes_find_what_one_finds(folder, tmp_path):
    arguments = [*SEARCH, "--images", str(folder), "--soft-targets", "--gflops", "0.025"]
    two = torchrun("-m", "diffrate_ext", *arguments, "--batch-size", "4", "--output", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert main([*arguments, "--batch-size", "8", "--output", str(tmp_path / "one")]) == 0
    assert Schedule.load(tmp_path / "two" / "schedule.json") == Schedule.load(tmp_path / "one" / "schedule.json")
    found, wanted = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["logits"] for name in ("two", "one")
    )
    for name, logits in wanted.items():
        assert logits.abs().max() > 0.1
        torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-5)
    histories = [json.loads((tmp_path / name / "history.json").read_text())["records"] for name in ("two", "one")]
    for there, here in zip(*histories, strict=True):  # of the whole batch, not of one process's part
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
        assert there["agreement"] == pytest.approx(here["agreement"])
    assert two.stdout.count("schedule.json") == 1  # the first process alone prints

    # and one process continues what two began, as long as the global batch is the same
    assert main([*arguments, "--batch-size", "8", "--output", str(tmp_path / "two"), "--resume"]) == 0


def test_an_error_of_all_processes(folder, tmp_path):
    arguments = [*SEARCH, "--images", str(folder), "--soft-targets", "--output", str(tmp_path / "search")]
    failed = torchrun("-m", "diffrate_ext", *arguments, "--gflops", "99")
    assert failed.returncode != 0
    assert "99 GFLOPs cannot be reached" in failed.stderr
    assert not (tmp_path / "search").exists()


def test_an_error_in_one_process_ends_all():
    failed = torchrun(str(Path(__file__).parents[1] / "tiny_search.py"), "fail on one rank")
    assert failed.returncode != 0
    assert "a broken loader on rank 1" in failed.stderr
