"""Schedules searched for time beside schedules searched for FLOPs, at the same measured time.

    python benchmarks/equal_time.py [--quick]

For each model and seed, one search aims at a share of the FLOPs. The other aims at the time that the first schedule
takes by a cost table of this machine. Both models are then timed in turn; where the second is more than 1 % off the
first, its search is done again with the target moved by as much. Then both are judged on the same pictures that
nothing was learned from. Needs the package onnx; pip downloads 100 MB. Half an hour on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence.statistics import paired
from evidence.subjects import FASHION_MNIST, Subject, dinov2_photographs, fashion_mnist
from harness import Spread
from machine import describe
from options import parse
from report import RESULTS, Record, Results, rewrite

from diffrate_ext import CostTable, Schedule, SearchSettings, compressed_copy, flops, profile_model, search
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.judging import Judgement, judge
from diffrate_ext.paired import Interval
from diffrate_ext.timing import Comparison, random_images

BY_FLOPS, FOR_TIME = "for FLOPs", "for time"
SAME_TIME = 0.01
"""Share of its time by which a model may be off to be as fast as another."""
ATTEMPTS = 3
"""Searches for time, at most, until one is as fast as the search for FLOPs."""


@dataclass(frozen=True)
class Effort:
    """How much is done for one model."""

    shares: tuple[str, ...] = ("65%", "50%")
    """Of the FLOPs: what searches for FLOPs aim at."""
    seeds: int = 3
    search_steps: int = 60
    search_images: int = 1000
    rounds: int = 21
    """Of timing."""
    batch_size: int = 16
    """Of what is timed."""


QUICK = Effort(shares=("60%",), seeds=2, search_steps=2, search_images=64, rounds=3, batch_size=2)


@dataclass(frozen=True)
class Found:
    """Two schedules of one seed, and what the second takes in time for one that the first takes, round by round."""

    by_flops: Schedule
    for_time: Schedule
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return Spread.of(self.ratios).median


def find(subject: Subject, costs: CostTable, share: str, seed: int, effort: Effort) -> Found:
    """Search for FLOPs, then for time until that is as fast; the one nearest to it counts."""
    settings = SearchSettings(steps=effort.search_steps, soft_targets=True, seed=seed)
    batches = partial(subject.search_batches, effort.search_images, effort.search_steps, seed)
    by_flops = search(subject.model, batches(), share, settings).schedule
    latency = costing_of(subject.model, costs).of_schedule(by_flops)
    best: Found | None = None
    for _ in range(ATTEMPTS):
        for_time = search(subject.model, batches(), settings=settings, latency=latency, costs=costs).schedule
        found = Found(by_flops, for_time, time_ratios(subject, by_flops, for_time, effort))
        if best is None or abs(found.ratio - 1) < abs(best.ratio - 1):
            best = found
        if abs(found.ratio - 1) <= SAME_TIME:
            break
        latency /= found.ratio
    assert best is not None
    return best


def time_ratios(subject: Subject, first: Schedule, second: Schedule, effort: Effort) -> list[float]:
    """Time of the model under the second schedule over that under the first, in each round."""
    comparison = Comparison(subject.model, [first, second], random_images(subject.model, effort.batch_size))
    for _ in comparison.run(effort.rounds):
        pass
    return [after / before for _, before, after in comparison.seconds]


def measured(subject: Subject, costs: CostTable, share: str, effort: Effort) -> Record:
    """The record of one model and share: schedules of all seeds, their times, and which loses less."""
    found = [find(subject, costs, share, seed, effort) for seed in range(effort.seeds)]
    schedules = {BY_FLOPS: [one.by_flops for one in found], FOR_TIME: [one.for_time for one in found]}
    every = [schedule for ones in schedules.values() for schedule in ones]
    model = subject.model
    speeds = Comparison(model, every, random_images(model, effort.batch_size)).measured(effort.rounds)
    judged = judge(model, [compressed_copy(model, schedule) for schedule in every], subject.test_batches())
    judgements = {BY_FLOPS: judged[: len(found)], FOR_TIME: judged[len(found) :]}
    costing = costing_of(model, costs)
    return {
        "model": subject.name,
        "title": subject.title,
        "share": share,
        "batch": effort.batch_size,
        "pictures": len(judged[0].errors),
        "measure": "cross-entropy" if subject.has_classes else "1 - cosine",
        "rows": [
            {
                "searched": kind,
                "seed": seed,
                "gflops_share": flops(model, schedule) / flops(model),
                "predicted_speed_up": costing.uncompressed / costing.of_schedule(schedule),
                "speed_up": speed.speed_up,
                "error": float(judgement.errors.mean()),
                "kept": [schedule.after_pruning, schedule.after_merging],
            }
            for (kind, seed), schedule, speed, judgement in zip(
                ((kind, seed) for kind in schedules for seed in range(effort.seeds)), every, speeds, judged, strict=True
            )
        ],
        "time_ratio": vars(Spread.of([ratio for one in found for ratio in one.ratios])),
        "time_ratio_by_seed": [one.ratio for one in found],
        "difference": vars(difference(judgements)),
    }


def difference(judgements: Mapping[str, Sequence[Judgement]]) -> Interval:
    """Of the errors, searched for time minus searched for FLOPs."""
    return paired(judgements[FOR_TIME], judgements[BY_FLOPS])


def subjects(cache: Path, *, quick: bool) -> list[tuple[Subject, Effort]]:
    """What is searched, and how much: DINOv2 takes seconds where the embedded model takes a tenth."""
    if quick:
        return [(fashion_mnist(FASHION_MNIST, 50), QUICK)]
    return [
        (fashion_mnist(FASHION_MNIST, 2000), Effort()),
        (dinov2_photographs(cache, 12), Effort(search_steps=20, search_images=160)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv, __doc__, quick="the embedded model alone with two steps, without a download")

    machine = describe(torch.device("cpu"))
    machine["remark"] = "Written by `python benchmarks/equal_time.py`."
    results = Results(options.output / "cpu_equal_time.json", machine, resume=options.resume)
    for subject, effort in subjects(options.cache, quick=options.quick):
        costs: CostTable | None = None
        for share in effort.shares:
            key: dict[str, Any] = {"model": subject.name, "share": share}
            if not results.has(key):
                print(*key.values(), file=sys.stderr, flush=True)
                costs = costs or profile_model(subject.model, batch_size=effort.batch_size)
                results.add(measured(subject, costs, share, effort))
    if options.output.resolve() == RESULTS:
        rewrite(options.output)
    print(results.path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
