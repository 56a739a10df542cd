"""From which batch size or number of tokens on compression pays on this machine, in each way to run a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn

from .compression.choice import NamedSchedule
from .models import adapter_for
from .running import UnavailableError, Way
from .timing import Benchmark, Comparison, random_images

Axis: TypeAlias = Literal["batch size", "tokens"]


@dataclass(frozen=True)
class Speed:
    """A model under one schedule beside the uncompressed model, both run in one way on batches of one size."""

    name: str
    """Of the schedule."""
    method: str
    way: Way
    tokens: int
    """That enter the uncompressed model's first block."""
    measured: Benchmark

    def at(self, axis: Axis) -> int:
        return self.tokens if axis == "tokens" else self.measured.batch_size


@dataclass(frozen=True)
class NotRun:
    """What this machine could not do."""

    way: Way
    tokens: int
    batch_size: int
    reason: str


def measure_speed(
    model: nn.Module,
    schedules: Sequence[NamedSchedule],
    *,
    batch_sizes: Sequence[int],
    ways: Sequence[Way] = ("eager",),
    rounds: int = 10,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[list[Speed], list[NotRun]]:
    """Time a model with and without compression at several batch sizes, in several ways to run it.

    Args:
        model: a supported model (docs/models.md). It is left as it is.
        schedules: that fit it.
        batch_sizes: images in a batch of random pixels.
        ways: to run it. What cannot be run is no error, but told.
        rounds: how often all models of one batch size and way are timed, in turn.
        on_progress: called after each round of a batch size and way.
    """
    tokens = adapter_for(model).stages[0].tokens
    speeds, not_run = list[Speed](), list[NotRun]()
    graphs_work = True
    for batch_size in batch_sizes:
        images = random_images(model, batch_size)
        for way in ways:
            if way == "graph" and not graphs_work:
                continue  # after a capture that failed, the next one needs a new process
            comparison = Comparison(model, [named.schedule for named in schedules], images, way=way)
            try:
                for _ in comparison.run(rounds):
                    on_progress()
            except (UnavailableError, torch.OutOfMemoryError) as error:
                not_run.append(NotRun(way, tokens, batch_size, str(error).splitlines()[0]))
                graphs_work = graphs_work and way != "graph"
                continue
            for named, measured in zip(schedules, comparison.results(), strict=True):
                speeds.append(Speed(named.name, named.schedule.method, way, tokens, measured))
    return speeds, not_run


@dataclass(frozen=True)
class BreakEven:
    """Where one schedule makes a model faster, in one way to run both."""

    name: str
    way: Way
    axis: Axis
    where: int
    """What does not vary: the tokens where batch sizes do, and the other way round."""
    speed_ups: dict[int, float]
    """Medians, at rising batch sizes or numbers of tokens."""
    faster: tuple[int, ...]
    """Where the first quartile is above 1."""
    slower: tuple[int, ...]
    """Where the third quartile is below 1. Elsewhere nobody can tell."""

    @property
    def begins_at(self) -> int | None:
        """From here on compression pays at everything that was tried; None where it does not at the largest."""
        start = None
        for value in reversed(self.speed_ups):
            if value not in self.faster:
                break
            start = value
        return start

    @property
    def words(self) -> str:
        """What to tell the user."""
        tried = list(self.speed_ups)
        others = [self._speed_up(value) for value in tried if value not in self.faster]
        if not others:
            values = ", ".join(map(str, tried))
            every = f"every {'number of tokens' if self.axis == 'tokens' else self.axis} tried ({values})"
            return f"pays at {every if len(tried) > 1 else self._place(tried[0])}"
        if not self.faster:
            return f"does not pay at {self._places(others)}"
        if self.begins_at is not None and len(self.faster) == tried[::-1].index(self.begins_at) + 1:
            return f"pays from {self._place(self.begins_at)} on, not at {', '.join(others)}"
        return f"pays at {self._places(map(str, self.faster))}, not at {', '.join(others)}"

    def _place(self, value: int | str) -> str:
        return f"{value} tokens" if self.axis == "tokens" else f"batch size {value}"

    def _places(self, values: Sequence[str] | map[str]) -> str:
        return self._place(", ".join(values))

    def _speed_up(self, value: int) -> str:
        doubt = "" if value in self.slower else ", within the noise"
        return f"{value} ({self.speed_ups[value]:.2f}x{doubt})"


def axis_of(speeds: Sequence[Speed]) -> Axis:
    """What varies; batch sizes, where both do."""
    batch_sizes, tokens = {speed.measured.batch_size for speed in speeds}, {speed.tokens for speed in speeds}
    return "tokens" if len(batch_sizes) == 1 and len(tokens) > 1 else "batch size"


def break_evens(speeds: Sequence[Speed]) -> list[BreakEven]:
    """For each schedule and way, along the batch sizes; along the tokens where only those vary."""
    axis = axis_of(speeds)
    other: Axis = "tokens" if axis == "batch size" else "batch size"
    rows: dict[tuple[str, Way, int], list[Speed]] = {}
    for speed in speeds:
        rows.setdefault((speed.name, speed.way, speed.at(other)), []).append(speed)
    return [
        BreakEven(
            name,
            way,
            axis,
            where,
            {speed.at(axis): speed.measured.speed_up for speed in row},
            tuple(speed.at(axis) for speed in row if speed.measured.speed_up_quartiles[0] > 1),
            tuple(speed.at(axis) for speed in row if speed.measured.speed_up_quartiles[1] < 1),
        )
        for (name, way, where), row in (
            (key, sorted(found, key=lambda speed: speed.at(axis))) for key, found in rows.items()
        )
    ]


@dataclass(frozen=True)
class Best:
    """The fastest way to run the uncompressed model, and the fastest of all compressed ones."""

    tokens: int
    batch_size: int
    uncompressed_way: Way
    uncompressed_images_per_second: float
    compressed: Speed

    @property
    def speed_up(self) -> float:
        """The median over the rounds where both are run alike; else a ratio of medians."""
        if self.compressed.way == self.uncompressed_way:
            return self.compressed.measured.speed_up
        return self.compressed.measured.images_per_second / self.uncompressed_images_per_second


def best_of(speeds: Sequence[Speed]) -> list[Best]:
    """For each number of tokens and batch size."""
    places: dict[tuple[int, int], list[Speed]] = {}
    for speed in speeds:
        places.setdefault((speed.tokens, speed.measured.batch_size), []).append(speed)
    found = []
    for (tokens, batch_size), here in places.items():
        plain = max(here, key=lambda speed: speed.measured.uncompressed_images_per_second)
        compressed = max(here, key=lambda speed: speed.measured.images_per_second)
        rate = plain.measured.uncompressed_images_per_second
        found.append(Best(tokens, batch_size, plain.way, rate, compressed))
    return found
