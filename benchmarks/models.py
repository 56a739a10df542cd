"""Whole models: uncompressed timm with fused attention, compressed by diffrate_ext, compressed in eager PyTorch, ToMe.

A contender is run as it is, as a CUDA graph, or by torch.compile; each of the three is a record of its own, in which
all contenders are run alike.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from cases import EAGER, OURS, Bar
from checks import SUMMATION, WrongResultError, relative_error
from harness import COMPILED, GRAPH, PLAIN, compiled, measure, peak_memory
from rival_model import EagerCompressed, compress_eager
from tome import tome_of_flops
from torch import Tensor, nn

from diffrate_ext import Schedule, compress, compressed_copy, flops, reference, running, uncompressed_copy
from diffrate_ext.embedded import build_model
from diffrate_ext.timing import random_images

UNCOMPRESSED = "uncompressed"
ALONE = f"{OURS}, compression alone"  # its patch embedding is the uncompressed model's
TOME = "ToMe"  # of at most as many FLOPs
IN_FULL_RUNS = (UNCOMPRESSED, OURS, ALONE, EAGER, TOME)
CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Model:
    """An architecture with random weights (speed does not depend on them) and the schedule to time it with."""

    name: str
    build: Callable[[], nn.Module]
    published: tuple[str, float]

    @property
    def schedule(self) -> Schedule:
        return Schedule.published(self.published[0], gflops=self.published[1])


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def mae(name: str) -> nn.Module:
    return timm_model(name, global_pool="avg")


DEIT_S = Model("DeiT-S 2.9 G", partial(timm_model, "deit_small_patch16_224"), ("ViT-S-DeiT", 2.9))
DEIT_B = Model("DeiT-B 11.5 G", partial(timm_model, "deit_base_patch16_224"), ("ViT-B-DeiT", 11.5))
VIT_L = Model("ViT-L (MAE) 42.3 G", partial(mae, "vit_large_patch16_224"), ("ViT-L-MAE", 42.3))
VIT_H = Model("ViT-H (MAE) 103.4 G", partial(mae, "vit_huge_patch14_224"), ("ViT-H-MAE", 103.4))
# has the token counts of DeiT-S, and so can take its schedule
EMBEDDED = Model("embedded ViT, schedule of DeiT-S 2.9 G", build_model, DEIT_S.published)


@dataclass(frozen=True)
class Run:
    """One record: a model at a batch size, its contenders run in one of three ways, and what is expected of it.

    ``gains`` are realised gains (speed-up over FLOPs ratio) to reach, each a "bar" or an "aim".
    """

    model: Model
    batch: int
    way: str = PLAIN
    contenders: tuple[str, ...] = (UNCOMPRESSED, OURS, EAGER)
    gains: tuple[tuple[float, str], ...] = ()
    bars: tuple[Bar, ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.model.name, "batch": self.batch, "way": self.way}


def plan(device: torch.device, dtype: torch.dtype, *, quick: bool, compile_models: bool) -> list[Run]:
    """What to run, on a GPU the most important first."""
    if device.type == "cuda" and not quick:
        return gpu_plan(dtype)
    cases = [(EMBEDDED, 1), (EMBEDDED, 16), (DEIT_S, 4)] if quick else list(product((DEIT_S, DEIT_B, VIT_L), (1, 16)))
    ways = [PLAIN, *([COMPILED] if compile_models else []), *([GRAPH] if device.type == "cuda" else [])]
    gains = ((0.97, "bar"), (1.0, "aim")) if (device.type, dtype) == ("cpu", torch.float32) else ()
    return [
        Run(model, batch, way, gains=gains if (model, batch, way) == (DEIT_S, 16, PLAIN) else ())
        for model, batch in cases
        for way in ways
    ]


def gpu_plan(dtype: torch.dtype) -> list[Run]:
    """float32, in which nobody runs large models, for the smallest only."""
    half = dtype != torch.float32
    not_slower = (Bar(UNCOMPRESSED, 1.0),) if half else ()
    gains = ((1.05, "bar"), (1.15, "aim")) if half else ()
    runs = []
    for model in (DEIT_B, VIT_L, VIT_H, DEIT_S) if half else (DEIT_S,):
        runs.append(Run(model, 256, contenders=IN_FULL_RUNS, gains=gains))
        # where launches decide: not much slower than uncompressed, and no slower without them
        runs.append(Run(model, 1, bars=(Bar(UNCOMPRESSED, 1 / 1.15),) if half else ()))
        runs.append(Run(model, 1, GRAPH, (UNCOMPRESSED, OURS), bars=not_slower))
        runs.append(Run(model, 32, GRAPH, (UNCOMPRESSED, OURS), bars=not_slower))
    if half:
        compiled_gains = ((1.0, "bar"),)
        runs += [Run(model, 256, COMPILED, (UNCOMPRESSED, OURS), compiled_gains) for model in (DEIT_B, VIT_L)]
    return runs


@dataclass(frozen=True)
class Prepared:
    """The contenders of one model, what they should give, and their GFLOPs."""

    contenders: dict[str, nn.Module]
    expected: Expectation
    gflops: float
    uncompressed_gflops: float


@functools.lru_cache(maxsize=1)  # runs of one model come one after the other
def prepared(spec: Model, device: torch.device, dtype: torch.dtype) -> Prepared:
    torch.manual_seed(0)
    with device:  # where large models draw their weights faster
        model = spec.build().eval().requires_grad_(False)
    schedule = spec.schedule
    expected = expectation(model, schedule, dtype)
    model.to(dtype)
    contenders = {
        UNCOMPRESSED: model,
        OURS: compressed_copy(model, schedule),
        ALONE: compress(uncompressed_copy(model), schedule, linear_patch_embedding=False),
        EAGER: compress_eager(model, schedule).eval(),
        TOME: tome_of_flops(model, flops(model, schedule)),
    }
    return Prepared(contenders, expected, flops(model, schedule) / 1e9, flops(model) / 1e9)


def run_model(run: Run, device: torch.device, dtype: torch.dtype, *, quick: bool) -> dict[str, Any]:
    """Checks the contenders, then times them; returns the record for the results."""
    ready = prepared(run.model, device, dtype)
    flops_ratio = ready.uncompressed_gflops / ready.gflops
    gains = [Bar(UNCOMPRESSED, gain * flops_ratio, kind) for gain, kind in run.gains]
    return {
        **run.key,
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": ready.gflops,
        "uncompressed_gflops": ready.uncompressed_gflops,
        "flops_ratio": flops_ratio,
        **run_contenders(run, ready, [*gains, *run.bars], quick=quick),
    }


@torch.inference_mode()
def run_contenders(run: Run, ready: Prepared, bars: list[Bar], *, quick: bool) -> dict[str, Any]:
    images = random_images(ready.contenders[UNCOMPRESSED], run.batch)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    unavailable: dict[str, str] = {}
    for name in run.contenders:
        contender = ready.contenders[name]
        call, reason = in_way(run.way, contender, images)
        if call is None:
            unavailable[name if run.way == PLAIN else f"{name}, {run.way}"] = reason or ""
            if run.way == GRAPH:
                break  # the next capture needs a new process
        else:
            calls[name] = call
    errors = {
        name: ready.expected.check(name, calls[name], run.batch) for name in calls if name not in (UNCOMPRESSED, TOME)
    }
    record: dict[str, Any] = {"rounds": 0, "seconds": {}, "speed_up": {}, "ratio": {}}
    if calls:
        limit = 20 if images.is_cuda else 300
        rounds = 3 if quick else 11 if images.is_cuda else 21
        timings = measure(calls, [(images,)], device=images.device, rounds=rounds, min_seconds=0.1, max_seconds=limit)
        record["rounds"] = timings.rounds
        record["seconds"] = {name: vars(timings.time(name)) for name in calls}
        if UNCOMPRESSED in calls:
            record["speed_up"] = {name: vars(timings.ratio(UNCOMPRESSED, name)) for name in calls}
        if OURS in calls:
            record["ratio"] = {name: vars(timings.ratio(name, OURS)) for name in calls if name != OURS}
    reached = {name: spread["median"] for name, spread in record["ratio"].items()}
    return {
        **record,
        "images_per_second": {name: run.batch / seconds["median"] for name, seconds in record["seconds"].items()},
        "relative_error": errors,
        "unavailable": unavailable,
        # a graph has its memory already
        "peak_bytes": {
            name: peak_memory(partial(call, images), images.device) for name, call in calls.items() if run.way != GRAPH
        },
        "bars": [bar.judge(reached) for bar in bars],
    }


def in_way(way: str, contender: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, str | None]:
    """The contender as it is, compiled for images like these or as a graph, or None and why that cannot be."""
    if way == COMPILED:
        return compiled(contender, (images,))
    return running.in_way("graph" if way == GRAPH else "eager", contender, images)


@dataclass(frozen=True)
class Expectation:
    """Logits of the compressed model by the reference's operators in float64, and how far from them one may be.

    Rounding may turn a near tie between two tokens around, and that image then differs by a token. So the median over
    the images decides: it may be twice that of the reference in the contender's own dtype, plus rounding as in
    checks.py.
    """

    images: Tensor
    exact: Tensor
    allowed: float

    def check(self, name: str, call: Callable[[Tensor], Tensor], batch: int) -> float:
        """Runs the images in batches of ``batch``; returns the median error or raises WrongResultError."""
        images = self.images.repeat(math.ceil(batch / len(self.images)), 1, 1, 1)
        logits = torch.cat([call(chunk).clone() for chunk in images.split(batch)])[: len(self.images)]
        error = median_error(logits, self.exact)
        if not error <= self.allowed:
            raise WrongResultError(f"{name}: median relative error {error:.2e}, allowed {self.allowed:.2e}")
        return error


def reference_model(model: nn.Module, schedule: Schedule) -> nn.Module:
    return EagerCompressed(model, schedule, reference.proportional_attention, reference.prune_merge).eval()


@torch.inference_mode()
def expectation(model: nn.Module, schedule: Schedule, dtype: torch.dtype) -> Expectation:
    """What the compressed ``model``, which is float32 yet, should give in ``dtype``."""
    wide = copy.deepcopy(model).double()
    images = random_images(wide, CHECKED_IMAGES)
    exact = reference_model(wide, schedule)(images)
    narrow = reference_model(copy.deepcopy(model).to(dtype), schedule)(images.to(dtype))
    return Expectation(images.to(dtype), exact, 2 * median_error(narrow, exact) + torch.finfo(dtype).eps + SUMMATION)


def median_error(logits: Tensor, exact: Tensor) -> float:
    errors = [relative_error(a, b) for a, b in zip(logits, exact, strict=True)]
    return float(torch.tensor(errors).median())
