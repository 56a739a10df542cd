"""Whether a difference between two models on the same images is more than chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean difference, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "no difference beyond chance"


def paired_interval(ours: ArrayLike, theirs: ArrayLike, more_variance: float = 0.0) -> Interval:
    """Of our numbers minus theirs, one number for each of the same images; the images are what was drawn by chance.

    Args:
        ours, theirs: (n,) each, n >= 2.
        more_variance: of the mean difference, from other chance than that of the images.
    """
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    mean = float(difference.mean())
    half = 1.96 * math.sqrt(float(difference.var(ddof=1)) / len(difference) + more_variance)
    return Interval(mean, mean - half, mean + half)
