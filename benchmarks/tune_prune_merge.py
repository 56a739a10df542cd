"""Every plan of prune_merge on CUDA (csrc/cuda/prune_merge_plan.cuh), timed side by side: which one to choose.

Plans are chosen by the variable DIFFRATE_PRUNE_MERGE_PLAN, so nothing is built anew. Times are microseconds per launch
in a CUDA graph of 20, over inputs that alternate, the median of 10 replays. A plan that fails is left out and named at
the end; the others go on.

    python benchmarks/tune_prune_merge.py              # on a GPU
    python benchmarks/tune_prune_merge.py --dry-run    # small, with the emulated device, to test this script
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import graph_seconds
from machine import measure_bandwidth
from torch import Tensor

from diffrate_ext import ops, reference

VARIABLE = "DIFFRATE_PRUNE_MERGE_PLAN"
START = time.perf_counter()
LAUNCHES, REPLAYS = 20, 10
CACHE = 120e6  # bytes that inputs take up together, at least: more than the L2 cache holds
MOST_SETS = 20


@dataclass(frozen=True)
class Shape:
    """A call: images, tokens, channels, whether with residual."""

    images: int
    tokens: int
    channels: int
    residual: bool = True

    @property
    def kept(self) -> tuple[int, int]:
        """k_p and k_m."""
        return round(self.tokens * 165 / 197), round(self.tokens * 148 / 197)

    @property
    def bytes(self) -> int:
        """That must be read and written at least."""
        k_p, k_m = self.kept
        return self.images * (k_p * (1 + self.residual) + k_m) * self.channels * 2


SHAPES = [
    *(Shape(images, 197, channels) for channels in (768, 384) for images in (1, 8, 32, 64, 128, 256)),
    Shape(256, 197, 768, residual=False),
    Shape(1, 257, 1280),
    Shape(256, 257, 1280),
    Shape(16, 197, 768),
    Shape(24, 197, 768),
    Shape(44, 197, 768),
]
SMALL = [Shape(1, 33, 64), Shape(3, 40, 96, residual=False)]


def plan_names() -> list[str]:
    """As the library lists them when it is asked for another one."""
    x = torch.zeros(1, 4, 8, dtype=torch.bfloat16, device=DEVICE)
    os.environ[VARIABLE] = "?"
    try:
        ops.prune_merge(x, torch.zeros(1, 3, device=DEVICE), 3, 2)
    except RuntimeError as error:
        names = str(error).split("must be one of ")[-1].split("\n")[0]
        return [name.strip() for name in names.split(",")]
    finally:
        os.environ.pop(VARIABLE, None)
    raise SystemExit(f"{VARIABLE} has no effect: is this build of diffrate_ext older than this script?")


class Inputs:
    """Sets of inputs of a shape, enough of them that a launch finds nothing of its own in the cache."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        each = shape.images * shape.tokens * shape.channels * 2 * (2 + shape.residual)
        count = 2 if DRY else max(3, min(MOST_SETS, math.ceil(CACHE / each)))
        self.sets = [self._make() for _ in range(count)]

    def _make(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shape = self.shape
        size = (shape.images, shape.tokens, shape.channels)
        x = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
        residual = torch.randn(size, device=DEVICE, dtype=torch.bfloat16) if shape.residual else None
        importance = torch.rand(shape.images, shape.tokens - 1, device=DEVICE)
        return x, importance, torch.rand(shape.images, shape.tokens, device=DEVICE) + 0.5, residual

    def call(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """The operator on set i."""
        x, importance, size, residual = self.sets[i % len(self.sets)]
        return ops.prune_merge(x, importance, *self.shape.kept, size, residual=residual)


def wrong(inputs: Inputs, result: tuple[Tensor, Tensor, Tensor]) -> str:
    """What is wrong with the result for set 0; nothing if all is right. Matches may differ where cosines are close."""
    x, importance, size, residual = (None if t is None else t[:8] for t in inputs.sets[0])
    out, out_size, slot = (t[:8].clone() for t in result)
    assert x is not None
    assert importance is not None
    assert size is not None
    (k_p, k_m), full = inputs.shape.kept, x if residual is None else x + residual
    order = reference.sort_order(importance, 1)
    place = torch.gather(slot, 1, order)
    kept = torch.arange(k_m, device=DEVICE)
    if not (place[:, :k_m] == kept).all() or not (place[:, k_p:] == -1).all():
        return "order"
    unit = torch.nn.functional.normalize(reference.gather_tokens(full, order).double(), dim=-1)
    cosines = unit[:, k_m:k_p] @ unit[:, 1:k_m].transpose(1, 2)
    match = place[:, k_m:k_p]
    if match.min() < 1 or match.max() >= k_m:
        return "match out of bounds"
    cosine = torch.gather(cosines, 2, match[..., None] - 1)[..., 0]
    if (cosines.max(-1).values - cosine).max() > 1e-5:
        return "match"
    means = reference.merge_reduce(full.double(), slot, k_m)
    if (out.double() - means).abs().max() > 0.03:
        return "features"
    sizes = torch.gather(size.double(), 1, order)
    expected = sizes[:, :k_m].scatter_add(1, match, sizes[:, k_m:k_p] * cosine)
    if (out_size.double() - expected).abs().max() > 1e-4:
        return "sizes"
    return ""


def differing(inputs: Inputs, result: tuple[Tensor, Tensor, Tensor]) -> int:
    """Slots that differ from those of the reference: some may, where cosines are close."""
    x, importance, size, residual = (None if t is None else t[:8] for t in inputs.sets[0])
    assert x is not None
    assert importance is not None
    full = (x if residual is None else x + residual).float()
    want = reference.prune_merge(full, importance, *inputs.shape.kept, size)
    return int((want[2] != result[2][:8]).sum())


def microseconds(call: Callable[[int], object]) -> float:
    """Per launch."""

    def launches() -> None:
        for i in range(LAUNCHES):
            call(i)

    return graph_seconds(launches, DEVICE, REPLAYS) * 1e6 / LAUNCHES


def tune(shape: Shape, names: list[str], bytes_per_us: float) -> None:
    """Prints the line of a shape."""
    inputs = Inputs(shape)
    times: dict[str, float] = {}
    cells, faults = [], set()
    for name in ("", *names):  # first what the library chooses
        cell = "-"
        os.environ[VARIABLE] = name and name + "!"
        try:
            result = inputs.call(0)
            fault = wrong(inputs, result)
            if fault:
                PROBLEMS.append(f"{shape}, {name or 'the choice'}: wrong {fault}")
                cell = "WRONG"
            else:
                faults.add(differing(inputs, result))
                del result
                times[name] = microseconds(inputs.call)
                cell = f"{times[name]:.1f}"
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            if "cannot run this call" not in text:
                PROBLEMS.append(f"{shape}, {name or 'the choice'}: {text[:200]}")
                cell = "ERROR"
        finally:
            os.environ.pop(VARIABLE, None)
        cells.append(cell.rjust(WIDTH))
    best = min((name for name in times if name), key=times.__getitem__, default="none")
    k_p, k_m = shape.kept
    print(
        f"{shape.images:4} {shape.tokens:4} {shape.channels:5} {k_p:4} {k_m:4} {'yes' if shape.residual else 'no':>3} |"
        + "".join(cells)
        + f" | {shape.bytes / bytes_per_us:6.1f}  {best}"
        + (f" ({times[best] / times['']:.2f} of the choice)" if best in times and "" in times else "")
        + f", slots unlike the reference: {sorted(faults)}",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    torch.manual_seed(0)
    names = plan_names()
    bytes_per_us = measure_bandwidth(DEVICE) / 1e6
    name = "CPU" if DRY else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, a copy takes {bytes_per_us / 1e6:.2f} TB/s; us per launch, bfloat16")
    print("   B    N     C  k_p  k_m res |" + "".join(n.rjust(WIDTH) for n in ["choice", *names]) + " |  floor  best")
    for shape in SMALL if DRY else SHAPES:
        if time.perf_counter() - START > ARGUMENTS.limit:
            print("out of time: the rest is left out")
            break
        try:
            tune(shape, names, bytes_per_us)
        except Exception as error:
            PROBLEMS.append(f"{shape}: {str(error)[:200]}")
    for problem in PROBLEMS:
        print("PROBLEM:", problem)
    print(f"{time.perf_counter() - START:.1f} s")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
parser.add_argument("--limit", type=float, default=20, help="seconds after which no further shape is begun")
ARGUMENTS = parser.parse_args()
DRY = ARGUMENTS.dry_run
DEVICE = torch.device("cpu" if DRY else "cuda")
PROBLEMS: list[str] = []
WIDTH = 14

if __name__ == "__main__":
    main()
    sys.exit(1 if PROBLEMS else 0)
