"""Means over seeds and images, and whether a difference is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffrate_ext.paired import Interval, paired_interval

from .runs import Outcome


class WithErrors(Protocol):
    """Whatever was judged image by image."""

    @property
    def errors(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Summary:
    """One row's runs."""

    seeds: int
    error: float
    """Cross-entropy, or 1 - cosine; the mean over images and seeds."""
    error_spread: float
    """Standard deviation over the seeds; 0 for one."""
    top1: float | None
    top1_spread: float | None
    agreement: float | None
    gflops: float
    searched_gflops: float | None


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    errors = [float(outcome.errors.mean()) for outcome in outcomes]
    hits = [float(outcome.hits.mean()) for outcome in outcomes if outcome.hits is not None]
    agrees = [float(outcome.agrees.mean()) for outcome in outcomes if outcome.agrees is not None]
    searched = [outcome.searched_gflops for outcome in outcomes if outcome.searched_gflops is not None]
    return Summary(
        len(outcomes),
        float(np.mean(errors)),
        _spread(errors),
        float(np.mean(hits)) if hits else None,
        _spread(hits) if hits else None,
        float(np.mean(agrees)) if agrees else None,
        float(np.mean([outcome.gflops for outcome in outcomes])),
        float(np.mean(searched)) if searched else None,
    )


def paired(ours: Sequence[WithErrors], theirs: Sequence[WithErrors]) -> Interval:
    """Our error minus theirs, on the same images: each image's errors are first averaged over seeds.

    The interval tells of images that were not drawn. That seeds differ comes on top where there are several: their
    variance is added.
    """
    variance = 0.0
    for outcomes in (ours, theirs):
        if len(outcomes) > 1:
            variance += float(np.var([outcome.errors.mean() for outcome in outcomes], ddof=1)) / len(outcomes)
    return paired_interval(_by_image(ours), _by_image(theirs), variance)


def _by_image(outcomes: Sequence[WithErrors]) -> NDArray[np.float64]:
    return np.mean([outcome.errors for outcome in outcomes], axis=0)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
