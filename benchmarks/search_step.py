"""One step of the rate search: time and peak memory beside the reference operators.

The rival is the same search step by :mod:`diffrate_ext.reference`, which follows the paper's formulas with explicit
attention maps, and computes the gradients of the weights too, as the authors' code does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from cases import OURS, PEAK_MEMORY, Bar
from checks import WrongResultError, relative_error
from harness import GRAPH, Spread, measure, peak_memory
from models import timm_model
from torch import Tensor, nn

from diffrate_ext import InputValueError, RateSearch, SearchSettings, flops, reference
from diffrate_ext import search as search_for_rates
from diffrate_ext.embedded import build_model
from diffrate_ext.methods import masking
from diffrate_ext.models.norm_ahead import NormAhead
from diffrate_ext.rate_search import rates
from diffrate_ext.running import captured, summary
from diffrate_ext.timing import random_images

RIVAL = "reference operators, with weight gradients"
FROZEN_RIVAL = "reference operators, weights frozen"
LOOP = "search(), bfloat16"
LOOP_STEPS, FIRST_STEPS = 40, 5  # of which the first ones are slower, and not counted
TARGET_SHARE = 0.63  # of the FLOPs, as DeiT-S at 2.9 G


@dataclass(frozen=True)
class Search:
    """An architecture with random weights, and a batch size."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    bars: tuple[Bar, ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.name, "batch": self.batch}


_DEIT_S = partial(timm_model, "deit_small_patch16_224")
SEARCHES = (
    Search("DeiT-S", _DEIT_S, 8, (Bar(RIVAL, 1.5), Bar(f"{RIVAL}{PEAK_MEMORY}", 2.0))),
    Search("embedded ViT", build_model, 64, (Bar(RIVAL, 2.0), Bar(f"{RIVAL}{PEAK_MEMORY}", 2.0))),
)
GPU_SEARCHES = (Search("DeiT-S", _DEIT_S, 128), Search("embedded ViT", build_model, 128))
QUICK_SEARCHES = (Search("embedded ViT", build_model, 8),)


def searches(device: torch.device, *, quick: bool) -> tuple[Search, ...]:
    if quick:
        return QUICK_SEARCHES
    return GPU_SEARCHES if device.type == "cuda" else SEARCHES


@contextmanager
def reference_operators() -> Iterator[None]:
    """The search step by the reference instead of the operators, and blocks apart from each other, while it lasts."""
    with (
        mock.patch.object(masking, "ops", reference),
        mock.patch.object(rates, "ops", reference),
        mock.patch.object(NormAhead, "between", return_value=None),
    ):
        yield


def search_step(search: RateSearch, images: Tensor, labels: Tensor, target: float) -> tuple[Tensor, ...]:
    """Forward and backward. Returns the loss and the gradients of the logits."""
    search.zero_grad(set_to_none=True)
    loss = F.cross_entropy(search(images), labels) + 5 * (search.gflops() - target) ** 2
    loss.backward()
    logits = (p for _, p in search.named_parameters(recurse=False))
    return loss.detach(), *(p.grad for p in logits if p.grad is not None)


def run_search_step(spec: Search, device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Checks that both ways give the same loss and gradients, then times them."""
    torch.manual_seed(0)
    ours = RateSearch(spec.build().to(device)).train()
    target = TARGET_SHARE * ours.reachable()[1]
    ours.project(target)
    state = ours.state_dict()

    def copy_of_ours(train_weights: bool) -> RateSearch:
        copied = RateSearch(spec.build().to(device), train_weights=train_weights).train()
        copied.load_state_dict(state)
        return copied

    images = random_images(ours.model, spec.batch)
    labels = torch.arange(spec.batch, device=device) % 10

    def by_reference(search: RateSearch) -> tuple[Tensor, ...]:
        with reference_operators():
            return search_step(search, images, labels, target)

    contenders: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        OURS: partial(search_step, ours, images, labels, target),
        RIVAL: partial(by_reference, copy_of_ours(True)),
        FROZEN_RIVAL: partial(by_reference, copy_of_ours(False)),
    }
    error = check(spec, state, target, device)
    timings = measure(
        contenders, [()], device=device, rounds=3 if quick else 15, min_seconds=0, max_seconds=60 if quick else 300
    )
    peaks = {name: peak_memory(call, device) for name, call in contenders.items()}
    ratio = {name: timings.ratio(name, OURS) for name in contenders if name != OURS}
    seconds = {name: vars(timings.time(name)) for name in contenders}
    unavailable = {}
    if device.type == "cuda":
        seconds[LOOP] = vars(Spread.of(loop_seconds(spec, device, cuda_graph=False)))
        name = f"{LOOP}, {GRAPH}"
        try:
            seconds[name] = vars(Spread.of(loop_seconds(spec, device, cuda_graph=True)))
        except InputValueError as error:
            unavailable[name] = summary(error)
    if device.type == "cuda" and not unavailable:  # a step that never waits for the host can be captured
        name = f"{OURS}, {GRAPH}"
        replay, reason = captured(contenders[OURS])
        if replay is None:
            unavailable[name] = reason or ""
        else:
            seconds[name] = vars(measure({name: replay}, [()], device=device, rounds=15, min_seconds=0).time(name))
    reached = {name: spread.median for name, spread in ratio.items()}
    reached.update({f"{name}{PEAK_MEMORY}": peaks[name] / peaks[OURS] for name in peaks})
    return {
        **spec.key,
        "rounds": timings.rounds,
        "seconds": seconds,
        "ratio": {name: vars(spread) for name, spread in ratio.items()},
        "peak_bytes": peaks,
        "relative_error": error,
        "unavailable": unavailable,
        "bars": [bar.judge(reached) for bar in spec.bars],
    }


def loop_seconds(spec: Search, device: torch.device, *, cuda_graph: bool) -> list[float]:
    """Of the steps of a whole search under autocast, with their updates and records; the images are on the device."""
    model = spec.build().to(device)
    batch = random_images(model, spec.batch), torch.arange(spec.batch) % 10
    ends: list[float] = []
    search_for_rates(
        model,
        [batch],
        TARGET_SHARE * flops(model) / 1e9,
        SearchSettings(steps=LOOP_STEPS, amp=True, cuda_graph=cuda_graph),
        report=lambda _: ends.append(time.perf_counter()),
    )
    return [end - start for start, end in itertools.pairwise(ends)][FIRST_STEPS:]


def check(spec: Search, state: dict[str, Tensor], target: float, device: torch.device) -> float:
    """Raises unless both ways give the same loss and gradients; returns the largest relative error.

    In float64: rounding would turn a near tie between two tokens around now and then, and random weights make many.
    """
    search = RateSearch(spec.build().double().to(device)).train()
    search.load_state_dict(state)
    images = random_images(search.model, 2)
    arguments = (search, images, torch.arange(2, device=device), target)
    ours = [result.clone() for result in search_step(*arguments)]
    with reference_operators():
        errors = [relative_error(a, b) for a, b in zip(ours, search_step(*arguments), strict=True)]
    if not max(errors) <= 1e-6:  # the rates themselves are float32
        raise WrongResultError(f"search step: relative errors of loss and gradients {errors}")
    return max(errors)
