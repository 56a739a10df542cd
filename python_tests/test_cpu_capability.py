"""Every instruction set gives the same order and slots, and the same numbers within rounding.

The choice is made once for each process, so each instruction set has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same
from torch import Tensor

import diffrate_ext

# long rows, rows that fill no vector, and the formats that each instruction set converts in its own way
PROGRAM = """
import sys
import torch
import diffrate_ext
from diffrate_ext import ops

torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
every_half = torch.arange(-(2**15), 2**15).short().view(torch.float16)
results = {"conversions": [ops.merge_reduce(every_half[None, :, None], torch.arange(2**16)[None], 2**16)]}
results["conversions"].append(ops.prune_merge(every_half.view(1, 256, 256), torch.zeros(1, 256), 256, 256)[0])
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for channels in (1, 3, 8, 37, 64, 384):
        x = torch.randn(2, 65, channels, generator=random).to(dtype)
        residual = torch.randn(2, 65, channels, generator=random).to(dtype)
        importance = torch.randint(9, (2, 3, 65), generator=random) / 8
        norm = ops.Norm(*torch.rand(2, channels, generator=random).to(dtype))
        size = 1 + torch.rand(2, 65, generator=random, dtype=torch.float64)
        results[f"sort_tokens {dtype} {channels}"] = tuple(ops.sort_tokens(x, importance[:, 0], size))
        # one channel: all cosines are 1 or -1, up to rounding
        if channels > 1:
            for mean_rule in ("mean", "weighted"):
                results[f"prune_merge {mean_rule} {dtype} {channels}"] = tuple(
                    ops.prune_merge(x, importance, 60, 40, size, mean_rule=mean_rule, residual=residual, norm=norm)
                )
        results[f"add_norm {dtype} {channels}"] = tuple(ops.add_norm(x, residual, norm))
        dst = torch.randint(-1, 20, (2, 65), generator=random)
        results[f"merge_reduce {dtype} {channels}"] = [
            ops.merge_reduce(x, dst, 20, weights=size), torch.ops.diffrate.merge_reduce_backward(x, dst.clamp_max(64))
        ]
        if channels < 384:
            q = x.view(2, 1, 65, channels)
            k = residual.view(2, 1, 65, channels)
            results[f"attention {dtype} {channels}"] = [
                ops.class_attention(q, k, size), ops.received_attention(q, k, size)
            ]
torch.save((diffrate_ext.build_info()["simd_in_use"], results), sys.argv[1])
"""


def run_with(capability: str, path: Path) -> tuple[str, dict[str, list[Tensor]]]:
    environment = {**os.environ, "DIFFRATE_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], check=True, env=environment, cwd=path.parent)
    return torch.load(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    in_use, results = run_with("plain", tmp_path_factory.mktemp("plain") / "results.pt")
    assert in_use == "plain"
    return results


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_same_results(capability: str, plain: dict[str, list[Tensor]], tmp_path: Path) -> None:
    if capability not in diffrate_ext.build_info()["simd_levels"]:
        pytest.skip("not built for this kind of processor")
    in_use, results = run_with(capability, tmp_path / "results.pt")
    if in_use != capability:
        pytest.skip(f"this processor runs {in_use}")
    assert results.keys() == plain.keys()
    for name, tensors in results.items():
        for index, (a, b) in enumerate(zip(tensors, plain[name], strict=True)):
            what = f"{name}, result {index}"
            if a.dtype == torch.int64 or name.startswith(("sort_tokens", "conversions")):
                assert_same(what, a, b)
            else:
                torch.testing.assert_close(a, b, msg=lambda message, what=what: f"{what}: {message}")


def test_a_misspelt_name_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "DIFFRATE_CPU_CAPABILITY": "avx1024"}
    command = [sys.executable, "-c", "import diffrate_ext"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "must be one of plain, avx2, avx512, got 'avx1024'" in done.stderr
