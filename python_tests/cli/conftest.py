"""Pictures, a terminal that is wide enough, and a machine that has nothing else to do."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Three pictures and a broken one, in a folder and a sub-folder."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "sub/c.png"):
        Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_text("no picture")
    return folder


@pytest.fixture
def labelled(tmp_path):
    """Four pictures of two classes of ImageNet."""
    folder = tmp_path / "labelled"
    random = np.random.default_rng(1)
    for name in ("n01440764/a.png", "n01440764/b.png", "n01443537/a.png", "n01443537/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (180, 180, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
