"""Speed of compressed models on this machine, beside the uncompressed model in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .compression.compress import check_made_for
from .compression.copies import compressed_copy, uncompressed_copy
from .compression.flops import flops
from .errors import InputValueError
from .images.data_config import data_config
from .machine import settle_memory
from .methods import Method, method_of
from .running import UnavailableError, Way, in_way

if TYPE_CHECKING:
    from .schedule import Schedule


@dataclass(frozen=True)
class Benchmark:
    """Speed of one compressed model against the uncompressed one: medians over interleaved rounds."""

    batch_size: int
    rounds: int
    gflops: float
    """Of the compressed model, for one image; multiply-accumulates / 1e9."""
    uncompressed_gflops: float
    seconds: float
    """Median time of one batch through the compressed model."""
    uncompressed_seconds: float
    speed_up: float
    """Median over the rounds of uncompressed / compressed time. Both were timed within seconds of each other in each
    round, so that a machine that is slower for a while does not move it."""
    speed_up_quartiles: tuple[float, float]
    """First and third quartile of the rounds' speed-ups."""

    @property
    def speed_up_spread(self) -> float:
        """Half the distance between the quartiles."""
        low, high = self.speed_up_quartiles
        return (high - low) / 2

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds

    @property
    def uncompressed_images_per_second(self) -> float:
        return self.batch_size / self.uncompressed_seconds

    @property
    def flops_ratio(self) -> float:
        """Uncompressed / compressed FLOPs: the speed-up if compression itself cost nothing."""
        return self.uncompressed_gflops / self.gflops

    @property
    def realised_gain(self) -> float:
        """Speed-up / FLOPs ratio: 1.0 when every FLOP saved is time saved."""
        return self.speed_up / self.flops_ratio


def benchmark(
    model: nn.Module,
    schedule: Schedule,
    *,
    batch_size: int = 16,
    images: Tensor | None = None,
    rounds: int = 10,
    warmup: int = 2,
    any_model: bool = False,
) -> Benchmark:
    """How much faster ``model`` becomes under ``schedule`` on this machine.

    Runs on the device and in the dtype of the model's parameters, in evaluation mode, without gradients. What is timed
    are copies that share the model's weights; the model is left as it is.

    Args:
        model: a model that :func:`diffrate_ext.compress` supports (compressed or not: both forms are timed).
        batch_size: images in a batch of random pixels (the speed does not depend on what they show).
        images: (B, C, H, W), to be used instead of random ones; B replaces ``batch_size``.
        rounds: how often both models are timed, in turn.
        warmup: untimed runs of each model before the first round.
        any_model: time a schedule although it says that it was made for another model.

    Raises:
        InputValueError: a batch size or a number of rounds below one, a negative number of warm-up runs, no images, or
            a schedule for another model.
        InputTypeError, InputValueError: as :func:`diffrate_ext.compress`, for a model or schedule that does not fit.
    """
    if not any_model:
        check_made_for(model, schedule)
    if images is None:
        images = random_images(model, batch_size)
    return Comparison(model, [schedule], images, warmup=warmup).measured(rounds)[0]


def random_images(model: nn.Module, batch_size: int) -> Tensor:
    """A batch of random images (batch_size, C, H, W) of the size that a timm model expects, on its device."""
    if batch_size < 1:
        raise InputValueError(f"batch_size must be at least 1, got {batch_size}")
    own = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *data_config(model)["input_size"], generator=generator)
    return images.to(own.device, own.dtype)


class Comparison:
    """A model uncompressed and compressed by several schedules, timed in turn on the same images.

    All are copies that share the model's weights; the model is left as it is. Arguments and errors as for
    :func:`benchmark`; ``methods``: one for each schedule, by default the schedule's own; ``way``: how all are run.
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Sequence[Schedule],
        images: Tensor,
        *,
        methods: Sequence[str | Method] | None = None,
        warmup: int = 2,
        way: Way = "eager",
    ) -> None:
        if len(images) == 0:
            raise InputValueError("images must hold at least one image")
        if warmup < 0:
            raise InputValueError(f"warmup must not be negative, got {warmup}")
        self.images = images
        self.gflops = [flops(model, schedule) / 1e9 for schedule in schedules]
        self.uncompressed_gflops = flops(model) / 1e9
        own = [method_of(schedule.method) for schedule in schedules]
        pairs = zip(schedules, methods or own, strict=True)
        copies = [compressed_copy(model, schedule, method=method) for schedule, method in pairs]
        self.models = [uncompressed_copy(model), *copies]
        self.warmup, self.way = warmup, way
        self.seconds: list[list[float]] = []

    def run(self, rounds: int) -> Iterator[int]:
        """Time every model ``rounds`` times; yields after each round, so that the caller can show progress.

        Raises:
            UnavailableError: this machine cannot run the models in that way.
        """
        if rounds < 1:
            raise InputValueError(f"rounds must be at least 1, got {rounds}")
        if self.way == "compiled":  # what was compiled for other shapes counts towards a limit
            torch.compiler.reset()
        calls = [self._call(model.eval()) for model in self.models]
        for times in interleaved(calls, rounds, warmup=self.warmup, device=self.images.device):
            self.seconds.append(times)
            yield len(self.seconds)

    def measured(self, rounds: int) -> list[Benchmark]:
        """The results of so many rounds, for callers that show no progress; errors as for :meth:`run`."""
        for _ in self.run(rounds):
            pass
        return self.results()

    def _call(self, model: nn.Module) -> Callable[[], object]:
        with torch.inference_mode():
            run, reason = in_way(self.way, model, self.images)
        if run is None:
            raise UnavailableError(reason)

        def call() -> object:
            with torch.inference_mode():
                return run(self.images)

        return call

    def results(self) -> list[Benchmark]:
        """One result for each schedule."""
        if not self.seconds:
            raise InputValueError("nothing was timed yet: run() comes before results()")
        uncompressed, *compressed = ([times[i] for times in self.seconds] for i in range(len(self.models)))
        results = []
        for gflops, seconds in zip(self.gflops, compressed, strict=True):
            ratios = sorted(slow / fast for slow, fast in zip(uncompressed, seconds, strict=True))
            results.append(
                Benchmark(
                    batch_size=len(self.images),
                    rounds=len(ratios),
                    gflops=gflops,
                    uncompressed_gflops=self.uncompressed_gflops,
                    seconds=statistics.median(seconds),
                    uncompressed_seconds=statistics.median(uncompressed),
                    speed_up=statistics.median(ratios),
                    speed_up_quartiles=(
                        ratios[(len(ratios) - 1) // 4],
                        ratios[len(ratios) - 1 - (len(ratios) - 1) // 4],
                    ),
                )
            )
        return results


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, *, warmup: int = 2, device: torch.device | None = None
) -> Iterator[list[float]]:
    """Time several calls in turn, ``rounds`` times; yields the seconds of each call, once for each round.

    Every round starts with another call, so that none always follows the same one.
    """
    on_cuda = device is not None and device.type == "cuda"
    if not on_cuda:
        settle_memory()
    for _ in range(warmup):
        for call in calls:
            call()
    for turn in range(rounds):
        seconds = [0.0] * len(calls)
        for i in range(len(calls)):
            index = (turn + i) % len(calls)
            if on_cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            calls[index]()
            if on_cuda:
                torch.cuda.synchronize(device)
            seconds[index] = time.perf_counter() - start
        yield seconds
