"""Compressed models in processes without Python code of theirs: packages of AOTInductor, and TorchScript."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_caformer, tiny_eva, tiny_images, tiny_schedule, tiny_vit
from torch import Tensor, nn

from diffrate_ext import InputTypeError, Schedule, compress, to_standard_operators

COMPARE = """
import sys

cases = torch.load("cases.pt")
assert len(cases) == 3
for images, expected in cases:
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
print(sorted({"timm", "diffrate_ext"} & set(sys.modules)))
"""


def loaded_elsewhere(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Code that makes a ``model``, and the comparison, in a process that does not start inside a checkout."""
    command = [sys.executable, "-c", code + COMPARE]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )


def save_cases(model: nn.Module, images: Tensor, folder: Path) -> None:
    """Batches of other sizes and other images, and what the model says of them."""
    with torch.no_grad():
        torch.save(
            [(some, model(some)) for some in (images, images[:1] - 1, torch.cat((images, -images)))],
            folder / "cases.pt",
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("standard", [True, False])
def test_a_package_of_aotinductor(standard: bool, tmp_path: Path) -> None:
    model = tiny_vit(depth=2)
    images = tiny_images(model)
    compress(model, Schedule([17, 13], [15, 9]))
    save_cases(model, images, tmp_path)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        program = to_standard_operators(program) if standard else program
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))

    load = 'import torch\nmodel = torch._inductor.aoti_load_package("model.pt2")\n'
    if not standard:
        failed = loaded_elsewhere(load, tmp_path)
        assert failed.returncode != 0
        assert "diffrate::" in failed.stderr
        load = "import diffrate_ext\n" + load
    done = loaded_elsewhere(load, tmp_path)
    assert done.returncode == 0, done.stderr
    if standard:
        assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [tiny_vit, tiny_eva, tiny_caformer])
def test_a_traced_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    images = tiny_images(model)
    compress(model, tiny_schedule(model))
    save_cases(model, images, tmp_path)
    with torch.no_grad():
        torch.jit.trace(model, images).save(tmp_path / "model.pt")
    done = loaded_elsewhere('import torch, diffrate_ext\nmodel = torch.jit.load("model.pt")\n', tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [tiny_vit, tiny_eva, tiny_caformer])
def test_scripts_and_symbolic_traces_are_refused(make: Callable[[], Any]) -> None:
    model = make()
    compress(model, tiny_schedule(model))
    for call in (torch.jit.script, torch.fx.symbolic_trace):
        with pytest.raises(InputTypeError, match=rf"{call.__name__} cannot read a compressed model: use torch\.export"):
            call(model)
        with pytest.raises(InputTypeError, match=r"use torch\.export"):
            call(nn.Sequential(model))
