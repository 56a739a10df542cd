"""What the tests of the commands share."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffrate_ext.cli.main import main

QUICK = ["--n-images", "16", "--batch-size", "8", "--rounds", "1"]
TEST_VIT = ["--model", "test_vit", "--no-pretrained"]


def rows(output: str) -> dict[str, list[str]]:
    """The lines of a table, by their first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


def assert_is_a_drawing(path, ink=0.2):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (pixels != 255).any(-1).mean() > ink


def fails(argv: list[str], capsys) -> str:
    """The one line on stderr of a call that must fail."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("diffrate: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def search(folder, *options: str) -> list[str]:
    """Arguments of a search of two steps, without the comparison at its end unless the options ask for it."""
    quick = ["--steps", "2", "--batch-size", "2", "--workers", "0", "--held-out", "0"]
    return ["search", *quick, "--output", str(folder), *options]
