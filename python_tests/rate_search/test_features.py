"""Searches of models without classes, whose features are kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_search import gflops_of, plain_model, quick, tiny_batches

from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.rate_search.loop import OFF_TARGET
from diffrate_ext.rate_search.rates import RateSearch
from diffrate_ext.rate_search.settings import SearchSettings


def test_features_are_kept_by_their_cosine():
    """The first step's loss is what two models side by side say, and learning brings it down."""
    model = plain_model(num_classes=0)
    images = tiny_batches()[0][0]
    records = []
    settings = SearchSettings(steps=30, lr=0.1, soft_targets=True, start="uniform")
    result = quick(model, [images], settings=settings, report=records.append)
    rates = RateSearch(copy.deepcopy(model))
    rates.set_schedule(uniform_schedule(model, gflops_of(model, 0.6)))
    rates.project(gflops_of(model, 0.6), OFF_TARGET)
    with torch.no_grad():
        cosine = F.cosine_similarity(rates.train()(images), model.eval()(images)).mean()
    assert records[0].accuracy == pytest.approx(float(cosine), abs=1e-6)
    assert records[0].loss == pytest.approx(1 - float(cosine), abs=1e-6)
    assert result.gflops == pytest.approx(gflops_of(model, 0.6), rel=0.05)
    assert min(record.loss for record in records[10:]) < records[0].loss


def test_labels_say_nothing_about_features():
    model = plain_model(num_classes=0)
    with pytest.raises(ValueError, match=r"has no classes \(num_classes=0\).*soft_targets=True"):
        quick(model, tiny_batches())
    settings = SearchSettings(steps=2, soft_targets=True)
    with_labels = quick(model, tiny_batches(), settings=settings)
    without = quick(model, [images for images, _ in tiny_batches()], settings=settings)
    assert with_labels == without
