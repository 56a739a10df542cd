"""Times every variant of the attention kernel (csrc/cuda/short_attention_variants.cuh) at vision transformers' shapes.

    python benchmarks/tune_attention.py [--seconds 25] [--dtype bfloat16]

Of each shape, each variant with sizes and the class token's attention, in microseconds a call, as CUDA graphs;
"default" is what the library chooses by itself, "floor" the time that a copy of as many bytes takes. What is wrong, or
does not fit, is said and left out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from harness import graph_seconds
from machine import measure_bandwidth
from torch import Tensor

import diffrate_ext.ops  # noqa: F401  (registers the operators)
from diffrate_ext import reference

VARIABLE = "DIFFRATE_ATTENTION_VARIANT"
STREAMING, DEFAULT = "streaming", "default"
CACHE = 160e6  # bytes: more than any cache holds
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Shape:
    """B, H, N, D, what has been measured, and what went wrong."""

    images: int
    heads: int
    tokens: int
    head_dim: int
    microseconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.images},{self.heads},{self.tokens},{self.head_dim}"

    @property
    def bytes(self) -> int:
        """Of q, k, v and the result."""
        return 8 * self.images * self.heads * self.tokens * self.head_dim


SHAPES = (
    [(256, 12, n, 64) for n in (197, 168, 156, 130, 100, 64)]
    + [(256, 16, n, 80) for n in (257, 200, 160)]
    + [(32, 12, n, 64) for n in (197, 130)]
    + [(1, 12, 197, 64), (1, 16, 257, 80)]
)
Inputs = tuple[Tensor, ...]  # q, k, v, size


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    qkv = torch.randn(shape.images, shape.tokens, 3, shape.heads, shape.head_dim, device=device).to(dtype)
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
    return q, k, v, torch.randint(1, 9, (shape.images, shape.tokens), device=device).float()


def attend(variant: str, data: Inputs) -> tuple[Tensor, Tensor]:
    """The operator itself: what Python checks costs the same with every variant."""
    if variant == DEFAULT:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = variant
    q, k, v, size = data
    try:
        return torch.ops.diffrate.proportional_attention(q, k, v, size, q.shape[-1] ** -0.5, 1, "class")
    finally:
        os.environ.pop(VARIABLE, None)


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Their names, from the message that an unknown one gets."""
    try:
        attend("?", inputs(Shape(1, 1, 16, shape.head_dim), dtype, device))
    except RuntimeError as error:
        names = str(error).split("must be one of ")[1].split("\n")[0].split(", ")
    names = [name.strip() for name in names if name.strip() != STREAMING]
    if shape.images * shape.heads < 132:
        names = [f"{name}/{splits}" for name in names for splits in (1, 2, 4)]
    return [STREAMING, DEFAULT, *names]


def error_of(actual: Tensor, expected: Tensor) -> float:
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    return error if error == error else math.inf


def check(variant: str, data: Inputs) -> str | None:
    """What is wrong, for the first images."""
    q, k, v, size = few = tuple(tensor[:4] for tensor in data)
    out, importance = attend(variant, few)
    q, k, v = q.float(), k.float(), v.float()
    expected = reference.proportional_attention(q, k, v, size, importance_from=None)[0]
    errors = error_of(out, expected), error_of(importance, reference.class_attention(q, k, size))
    if errors[0] <= TOLERANCE[data[0].dtype] and errors[1] <= 1e-3:
        return None
    return f"WRONG by {errors[0]:.1e} (out), {errors[1]:.1e} (importance)"


def timed(call: Callable[[Inputs], object], sets: list[Inputs], calls: int, replays: int) -> float:
    """Microseconds a call, as a CUDA graph of `calls` calls that go round the sets of inputs."""

    def around() -> None:
        for i in range(calls):
            call(sets[i % len(sets)])

    return graph_seconds(around, sets[0][0].device, replays) * 1e6 / calls


def tune(shape: Shape, dtype: torch.dtype, device: torch.device, calls: int, replays: int) -> None:
    sets = [inputs(shape, dtype, device) for _ in range(max(2, min(8, math.ceil(CACHE / shape.bytes))))]
    contenders: dict[str, Callable[[Inputs], object]] = {
        name: partial(attend, name) for name in variants(shape, dtype, device)
    }
    contenders["torch"] = lambda data: F.scaled_dot_product_attention(data[0], data[1], data[2])
    for name, call in contenders.items():
        try:
            wrong = check(name, sets[0]) if name != "torch" else None
            if wrong is None:
                shape.microseconds[name] = timed(call, sets, calls, replays)
            else:
                shape.failures.append(f"{name}: {wrong}")
        except Exception as error:  # of one variant: the others are still of interest
            shape.failures.append(f"{name}: {str(error).splitlines()[0][:150]}")


def report(shapes: list[Shape], bandwidth: float) -> None:
    print(f"\n{'B,H,N,D':>16} {'floor':>7} {'torch':>7} {'stream':>7} {'default':>7} {'best':>7}  by")
    for shape in shapes:
        ours = {name: us for name, us in shape.microseconds.items() if name not in ("torch", DEFAULT)}
        if not ours:
            continue
        best = min(ours, key=ours.__getitem__)
        times = [shape.microseconds.get(name, math.nan) for name in ("torch", STREAMING, DEFAULT, best)]
        print(
            f"{shape!s:>16} {shape.bytes / bandwidth * 1e6:7.1f} "
            + " ".join(f"{us:7.1f}" for us in times)
            + f"  {best}"
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=25, help="begin no shape after so many")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, help="instead of each shape's number: to try the script out")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    begin = time.monotonic()
    shapes = [Shape(arguments.images or images, heads, n, depth) for images, heads, n, depth in SHAPES]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    bandwidth = measure_bandwidth(device)
    print(f"{name}, torch {torch.__version__}, {arguments.dtype}, a copy takes {bandwidth / 1e12:.2f} TB/s", flush=True)
    for shape in shapes:
        if time.monotonic() - begin > arguments.seconds:
            print(f"no time for {shape}")
            continue
        try:
            tune(shape, dtype, device, calls=20, replays=10)
        except Exception as error:  # out of memory, say
            shape.failures.append(str(error).splitlines()[0][:150])
        print(f"\n{shape}, floor {shape.bytes / bandwidth * 1e6:.1f}  [{time.monotonic() - begin:.1f} s]")
        for name, microseconds in sorted(shape.microseconds.items(), key=lambda item: item[1]):
            print(f"  {microseconds:8.1f}  {name}")
        for failure in shape.failures:
            print(f"           {failure}")
        sys.stdout.flush()
    report(shapes, bandwidth)


if __name__ == "__main__":
    main()
