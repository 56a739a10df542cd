"""Whole models: uncompressed timm with fused attention, compressed by diffrate_ext, compressed in eager PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cases import OURS, Bar
from checks import SUMMATION, WrongResultError, relative_error
from harness import compiled, measure, peak_memory
from rival_model import EagerCompressed, compress_eager
from torch import Tensor, nn

from diffrate_ext import Schedule, reference
from diffrate_ext.embedded import build_model
from diffrate_ext.flops import flops
from diffrate_ext.sharing import compressed_copy
from diffrate_ext.timing import random_images

UNCOMPRESSED, EAGER = "uncompressed", "eager"
CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Model:
    """An architecture with random weights (speed does not depend on them) and the schedule to time it with."""

    name: str
    build: Callable[[], nn.Module]
    published: tuple[str, float]
    batches: tuple[int, ...] = (1, 16)
    bars: dict[int, tuple[Bar, ...]] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        return Schedule.published(self.published[0], gflops=self.published[1])


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


# 1.586: 4.608 / 2.905, the FLOPs of DeiT-S over those of the schedule
_DEIT_S = Model(
    "DeiT-S 2.9 G",
    partial(timm_model, "deit_small_patch16_224"),
    ("ViT-S-DeiT", 2.9),
    bars={16: (Bar(UNCOMPRESSED, 0.97 * 1.586), Bar(UNCOMPRESSED, 1.586, "aim"))},
)
MODELS = (
    _DEIT_S,
    Model("DeiT-B 11.5 G", partial(timm_model, "deit_base_patch16_224"), ("ViT-B-DeiT", 11.5)),
    Model("ViT-L (MAE) 42.3 G", partial(timm_model, "vit_large_patch16_224", global_pool="avg"), ("ViT-L-MAE", 42.3)),
)
# the embedded model has the token counts of DeiT-S, and so can take its schedule
QUICK_MODELS = (
    Model("embedded ViT, schedule of DeiT-S 2.9 G", build_model, ("ViT-S-DeiT", 2.9)),
    Model("DeiT-S 2.9 G", _DEIT_S.build, _DEIT_S.published, batches=(4,)),
)


def run_model(
    spec: Model, device: torch.device, dtype: torch.dtype, *, quick: bool, compile_models: bool
) -> Iterator[dict[str, Any]]:
    """One record per batch size."""
    torch.manual_seed(0)
    model = spec.build().eval().requires_grad_(False)
    schedule = spec.schedule
    costs = {"gflops": flops(model, schedule) / 1e9, "uncompressed_gflops": flops(model) / 1e9}
    expected = expectation(model, schedule, device, dtype)  # moves the model
    contenders: dict[str, nn.Module] = {
        UNCOMPRESSED: model,
        OURS: compressed_copy(model, schedule),
        EAGER: compress_eager(model, schedule).eval(),
    }
    for batch in spec.batches:
        bars = spec.bars.get(batch, ()) if device.type == "cpu" and dtype == torch.float32 else ()
        yield {
            "model": spec.name,
            "batch": batch,
            "dtype": str(dtype).removeprefix("torch."),
            **costs,
            "flops_ratio": costs["uncompressed_gflops"] / costs["gflops"],
            **run_batch(
                contenders, random_images(model, batch), expected, bars, quick=quick, compile_models=compile_models
            ),
        }


@torch.inference_mode()
def run_batch(
    contenders: dict[str, nn.Module],
    images: Tensor,
    expected: Expectation,
    bars: tuple[Bar, ...],
    *,
    quick: bool,
    compile_models: bool,
) -> dict[str, Any]:
    """Checks the contenders, then times them on ``images``."""
    batch, device = len(images), images.device
    calls: dict[str, Callable[[Tensor], Tensor]] = dict(contenders)
    unavailable: dict[str, str] = {}
    for name, contender in contenders.items() if compile_models else ():
        fast, reason = compiled(contender, (images,))
        if fast is None:
            unavailable[f"{name}, compiled"] = reason or ""
        else:
            calls[f"{name}, compiled"] = fast
    errors = {
        name: expected.check(name, call, batch) for name, call in calls.items() if not name.startswith(UNCOMPRESSED)
    }
    timings = measure(calls, [(images,)], device=device, rounds=3 if quick else 21, min_seconds=0.1, max_seconds=300)
    return {
        "rounds": timings.rounds,
        "images_per_second": {name: batch / timings.time(name).median for name in calls},
        "seconds": {name: vars(timings.time(name)) for name in calls},
        "speed_up": {name: vars(timings.ratio(UNCOMPRESSED, name)) for name in calls},
        "ratio": {name: vars(timings.ratio(name, OURS)) for name in calls if name != OURS},
        "relative_error": errors,
        "unavailable": unavailable,
        "peak_bytes": {name: peak_memory(partial(call, images), device) for name, call in calls.items()},
        "bars": [bar.judge(timings.ratio(bar.rival, OURS)) for bar in bars],
    }


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
        logits = torch.cat([call(chunk) for chunk in images.split(batch)])[: len(self.images)]
        error = median_error(logits, self.exact)
        if not error <= self.allowed:
            raise WrongResultError(f"{name}: median relative error {error:.2e}, allowed {self.allowed:.2e}")
        return error


def reference_model(model: nn.Module, schedule: Schedule) -> nn.Module:
    return EagerCompressed(model, schedule, reference.proportional_attention, reference.prune_merge).eval()


@torch.inference_mode()
def expectation(model: nn.Module, schedule: Schedule, device: torch.device, dtype: torch.dtype) -> Expectation:
    """What the compressed ``model`` (float32, on the CPU) should give; moves it to ``device`` and ``dtype``."""
    wide = copy.deepcopy(model).double()
    images = random_images(wide, CHECKED_IMAGES)
    exact = reference_model(wide, schedule)(images)
    images = images.to(device, dtype)
    narrow = reference_model(model.to(device, dtype), schedule)(images)
    return Expectation(images, exact, 2 * median_error(narrow, exact) + torch.finfo(dtype).eps + SUMMATION)


def median_error(logits: Tensor, exact: Tensor) -> float:
    errors = [relative_error(a, b) for a, b in zip(logits.cpu(), exact, strict=True)]
    return float(torch.tensor(errors).median())
