"""Methods of token compression side by side, on one model and the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .answers import answer_of, has_classes
from .compression.compress import check_made_for
from .compression.flops import flops
from .compression.targets import gflops_of
from .compression.uniform import SHARES, uniform_schedule
from .errors import InputTypeError, InputValueError
from .evaluation import Batch, Evaluation, evaluate_all
from .methods import METHODS, Method, method_of
from .models import adapter_for
from .schedule import Schedule
from .timing import Benchmark, Comparison, random_images

UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class Compared:
    """How one method does at one schedule."""

    method: str
    """Its name, or "uncompressed"."""
    label: str
    """What the schedule is called: its target, or the name it was given."""
    schedule: Schedule | None
    uniform: bool
    """Whether the schedule is made by the method's usual rule, rather than given."""
    gflops: float
    evaluation: Evaluation
    """Top-1 and loss where the images have labels; agreement with the uncompressed model where it has a head."""
    cosine: float
    """Between the pooled features (what the head takes) and those of the uncompressed model; the mean over images."""
    speed: Benchmark | None
    """None: the uncompressed model itself."""


def compare(
    model: nn.Module,
    loader: Iterable[Batch],
    gflops: Sequence[float | str] | None = None,
    methods: Sequence[str | Method] | None = None,
    *,
    schedules: Mapping[str, Schedule] | None = None,
    any_model: bool = False,
    batch_size: int = 16,
    rounds: int = 10,
    on_progress: Callable[[str, int], None] | None = None,
) -> list[Compared]:
    """What each method costs a model in accuracy and saves it in time, at the same FLOPs.

    Runs on the device and in the dtype of the model's parameters. What is compressed are copies that share its
    weights; the model is left as it is.

    Args:
        model: a supported model (docs/models.md), with or without a head.
        loader: batches of images, or (images, labels), as :func:`evaluate` takes them; read once.
        gflops: targets, in units of 1e9 multiply-accumulates of one image or as a share of the model's (``"60%"``),
            each met by the method's usual schedule. None: 80, 65 and 50 % of the model's, or none where ``schedules``
            are given.
        methods: as for :func:`compress`. None: all that can run the model and need no training first.
        schedules: others to measure, by name, such as learned ones; under DiffRate.
        any_model: measure one of them although it says that it was made for another model.
        batch_size, rounds: of the timing, as for :func:`benchmark`.
        on_progress: called with "images", once for each batch, and "timing", once for each round, and the number so
            far.

    Returns:
        the uncompressed model, then each method at each target that it can reach, then ``schedules``.

    Raises:
        InputTypeError, InputValueError: the model, a schedule, a method or a target does not fit, or there are no
            images.
    """
    if rounds < 1:
        raise InputValueError(f"rounds must be at least 1, got {rounds}")
    for name, values in (("gflops", gflops), ("methods", methods)):
        if values is not None and (isinstance(values, str) or not isinstance(values, Sequence)):
            raise InputTypeError(f"{name} must be a list or a tuple, got {values!r}")
    if schedules is not None and not isinstance(schedules, Mapping):
        raise InputTypeError(f"schedules must be a dict of names and schedules, got {type(schedules).__name__}")
    for schedule in (schedules or {}).values() if not any_model else ():
        check_made_for(model, schedule)
    settings = _settings(model, gflops, methods, schedules or {})
    timing = Comparison(
        model,
        [one.schedule for one in settings],
        random_images(model, batch_size),
        methods=[one.method for one in settings],
    )

    def watched() -> Iterator[Batch]:
        for index, batch in enumerate(loader):
            yield batch
            if on_progress is not None:
                on_progress("images", index + 1)

    with _pooled_features(timing.models) as cosines:
        evaluations = evaluate_all(timing.models, watched())
    if has_classes(model):
        evaluations[0] = replace(evaluations[0], agreement=1.0)
    for done in timing.run(rounds):
        if on_progress is not None:
            on_progress("timing", done)
    first = Compared(UNCOMPRESSED, "", None, False, flops(model) / 1e9, evaluations[0], 1.0, None)
    others = [
        Compared(
            str(one.method),
            one.label,
            one.schedule,
            one.uniform,
            speed.gflops,
            evaluation,
            cosine / evaluation.n,
            speed,
        )
        for one, evaluation, cosine, speed in zip(settings, evaluations[1:], cosines[1:], timing.results(), strict=True)
    ]
    return [first, *others]


class _Setting(NamedTuple):
    label: str
    method: Method
    schedule: Schedule
    uniform: bool


def _settings(
    model: nn.Module,
    gflops: Sequence[float | str] | None,
    methods: Sequence[str | Method] | None,
    schedules: Mapping[str, Schedule],
) -> list[_Setting]:
    if methods is not None and not methods:
        raise InputValueError("methods must name at least one method")
    uncompressed = flops(model) / 1e9
    if gflops is None:
        gflops = [] if schedules else [share * uncompressed for share in SHARES]
    targets = [gflops_of(model, target) for target in gflops]
    found: list[_Setting] = []
    for method in _runnable(model) if methods is None else [method_of(method) for method in methods]:
        for target in targets:
            try:
                schedule = uniform_schedule(model, target, method=method)
            except InputValueError:
                if methods is not None or not 0 < target <= uncompressed:  # EViT, say, cannot go down as far as others
                    raise
                continue
            found.append(_Setting(f"{target:.3g} GFLOPs", method, schedule, uniform=True))
    found += [_Setting(name, method_of(one.method), one, uniform=False) for name, one in schedules.items()]
    if not found:
        raise InputValueError("there is nothing to compare: name a target that a method can reach, or a schedule")
    return found


def _runnable(model: nn.Module) -> list[Method]:
    adapter = adapter_for(model)
    everything = [stage.all_tokens for stage in adapter.stages]
    found = []
    for method in (method() for method in METHODS.values() if not method.needs_training):
        try:
            method.check(adapter, everything)
        except InputValueError:
            continue
        found.append(method)
    return found


@contextmanager
def _pooled_features(models: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Within a ``with`` block, sums over images of the cosines between what a model's head takes and the first's.

    The models have to run in order on each batch, the first one before the others.
    """
    sums = [0.0] * len(models)
    wanted: list[Tensor] = []

    def compare_with_first(index: int, features: Tensor) -> None:
        features = features.to(torch.float32)
        if index == 0:
            wanted[:] = [features]
        sums[index] += float(F.cosine_similarity(features, wanted[0], dim=-1).sum())

    def watch(index: int, model: nn.Module) -> RemovableHandle:
        head = adapter_for(model).head
        if head is None:
            return model.register_forward_hook(lambda _, __, output: compare_with_first(index, answer_of(output)))
        return head.register_forward_pre_hook(lambda _, inputs: compare_with_first(index, inputs[0]))

    handles = [watch(index, model) for index, model in enumerate(models)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
