"""The picture of a search says what the accuracy of its records is."""

from __future__ import annotations

import pytest
from tiny_search import plain_model, quick, tiny_batches

from diffrate_ext.rate_search import plot
from diffrate_ext.rate_search.settings import SearchSettings


@pytest.mark.parametrize(
    ("classes", "labelled", "soft_targets", "expected"),
    [
        (5, True, False, "accuracy"),
        (5, True, True, "accuracy"),
        (5, False, True, "agreement"),
        (0, True, True, "cosine"),
        (0, False, True, "cosine"),
    ],
)
def test_measure(classes, labelled, soft_targets, expected, tmp_path, monkeypatch):
    seen = []

    def draw(history, schedule, gflops):
        seen.append(history.measure)
        return draw_search(history, schedule, gflops)

    draw_search = plot.draw_search
    monkeypatch.setattr(plot, "draw_search", draw)
    images, labels = tiny_batches()[0]
    settings = SearchSettings(steps=1, soft_targets=soft_targets)
    batch = [images, labels] if labelled else images
    quick(plain_model(num_classes=classes), [batch], settings=settings, output=tmp_path / "search")
    assert seen == [expected]
