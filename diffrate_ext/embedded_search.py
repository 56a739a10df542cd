"""The rate search on the embedded model: what ``diffrate demo`` shows and ``diffrate search`` does by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import embedded
from .evaluation import Batch
from .images.sources import open_images, without_labels
from .rate_search.history import StepRecord
from .rate_search.loop import SearchResult, search
from .rate_search.settings import SearchSettings
from .training.data import training_loader


def search_embedded(
    gflops: float,
    *,
    seed: int = 0,
    steps: int = embedded.SEARCH_STEPS,
    report: Callable[[StepRecord], None] | None = None,
    **changes: Any,
) -> SearchResult:
    """Learn a schedule for the embedded model from the 1,000 embedded training images, with other settings if asked.

    With soft targets: the model has seen these images with their labels, and how far it leaves its own opinion says
    more than its errors. Without augmentation: nor are the test images flipped or shifted.
    """
    model, images = embedded.load_model(), without_labels(open_images(None))

    def loader(start: int) -> Iterable[Batch]:
        plain: dict[str, Any] = {"augment": False, "mixup": 0, "cutmix": 0, "smoothing": 0}
        return training_loader(images, model, batch_size=64, steps=steps, seed=seed, start=start, **plain)

    settings = SearchSettings(steps=steps, soft_targets=True, seed=seed, **changes)
    return search(model, loader, gflops, settings, report=report)
