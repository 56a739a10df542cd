"""torchvision beside a CPU-only torch: a stub where it does not load, and none where it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A torchvision that fits registers its operators as it is imported. One that does not has none to describe.
FITS = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
DESCRIBES = """
import torch
@torch.library.register_fake("torchvision::nms")
def _(dets, scores, iou_threshold):
    return dets
"""


def import_beside_cpu_torch(tmp_path: Path, torchvision: str) -> subprocess.CompletedProcess[str]:
    """Import diffrate_ext and then this torchvision, under a torch that says it is a CPU-only build."""
    (tmp_path / "torchvision.py").write_text(torchvision, encoding="utf-8")
    program = (
        "import torch; torch.version.cuda = torch.version.hip = None\n"
        "import diffrate_ext, torchvision\nprint('imported')\n"
    )
    command = [sys.executable, "-c", program]  # finds modules in its own folder first
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_a_torchvision_that_fits_keeps_its_operators(tmp_path: Path) -> None:
    done = import_beside_cpu_torch(tmp_path, FITS + DESCRIBES)
    assert done.stdout == "imported\n", done.stderr


def test_a_torchvision_without_operators_can_be_imported(tmp_path: Path) -> None:
    done = import_beside_cpu_torch(tmp_path, DESCRIBES)
    assert done.stdout == "imported\n", done.stderr


def test_other_faults_of_torchvision_are_its_own(tmp_path: Path) -> None:
    done = import_beside_cpu_torch(tmp_path, "raise RuntimeError('broken')")
    assert done.returncode == 1
    assert "RuntimeError: broken" in done.stderr
