"""Models image by image, and whether they differ by more than chance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffrate_ext.judging import judge
from diffrate_ext.paired import paired_interval


class Answers(nn.Module):
    """Says of image i, whose pixels are i, what row i of a table holds."""

    def __init__(self, *rows: list[float], classes: int = 2) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(rows))
        self.num_classes = classes

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long()]


IMAGES = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
BATCHES = [IMAGES[:2], IMAGES[2:]]
SURE, OTHER, UNSURE = [math.log(3), 0.0], [0.0, math.log(3)], [0.0, 0.0]  # probabilities 3/4 and 1/4; 1/4, 3/4; 1/2


def test_labels() -> None:
    batches: Any = [(IMAGES[:2], torch.tensor([0, 0])), (IMAGES[2:], torch.tensor([1]))]
    plain, other = Answers(SURE, SURE, OTHER), Answers(SURE, OTHER, UNSURE)
    found = judge(plain, [other, plain], batches)
    assert found[0].errors == pytest.approx([-math.log(0.75), -math.log(0.25), -math.log(0.5)])
    assert found[0].top1 == pytest.approx(1 / 3)  # of two that are equal, the first counts
    assert found[0].agreement == pytest.approx(1 / 3)
    assert (found[1].top1, found[1].agreement) == (1, 1)


def test_without_labels_the_uncompressed_model_is_right() -> None:
    plain, other = Answers(SURE, SURE, SURE), Answers(SURE, OTHER, UNSURE)
    (found,) = judge(plain, [other], BATCHES)
    three, one = math.log(0.75), math.log(0.25)
    expected = [-0.75 * three - 0.25 * one, -0.75 * one - 0.25 * three, -math.log(0.5)]
    assert found.errors == pytest.approx(expected, rel=1e-6)
    assert found.top1 is None
    assert found.agreement == pytest.approx(2 / 3)


def test_without_classes_features_count() -> None:
    plain = Answers([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], classes=0)
    (found,) = judge(plain, [Answers([2.0, 0.0], [0.0, 1.0], [1.0, 1.0], classes=0)], BATCHES)
    assert found.errors == pytest.approx([0, 1, 1 - math.sqrt(0.5)], abs=1e-6)
    assert (found.top1, found.agreement) == (None, None)


def test_an_interval_of_paired_differences() -> None:
    theirs = np.array([1.0, 2.0, 3.0, 4.0])
    interval = paired_interval(theirs + np.array([0.1, 0.3, 0.1, 0.3]), theirs)
    half = 1.96 * math.sqrt((4 * 0.01 / 3) / 4)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert interval.verdict == "higher"
    assert paired_interval(theirs, theirs + 0.1).verdict == "lower"
    assert paired_interval(theirs + np.array([1, -1, 1, -1]), theirs).verdict == "no difference beyond chance"
    wider = paired_interval(theirs + 0.2, theirs, more_variance=0.25)
    assert wider.high - wider.low == pytest.approx(2 * 1.96 * 0.5)
