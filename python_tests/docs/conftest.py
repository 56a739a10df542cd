"""Documentation runs as it stands, but for the time that it takes."""

from __future__ import annotations

from typing import Any

import pytest

from diffrate_ext import FinetuneSettings, SearchSettings, comparison, timing


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings end after two steps, timings after one round of two images."""
    interleaved, random_images = timing.interleaved, timing.random_images
    for settings in (SearchSettings, FinetuneSettings):
        monkeypatch.setattr(settings, "__post_init__", _in_two_steps(settings.__post_init__))
    monkeypatch.setattr(timing, "interleaved", lambda calls, rounds, **_: interleaved(calls, 1, warmup=0))
    for module in (timing, comparison):
        monkeypatch.setattr(module, "random_images", lambda model, batch_size: random_images(model, 2))


def _in_two_steps(check: Any) -> Any:
    def shortened(settings: Any) -> None:
        object.__setattr__(settings, "steps", 2)
        check(settings)

    return shortened
