"""What happened during a search, in a bounded number of records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..schedule import Schedule
from ..training.records import is_recorded


@dataclass(frozen=True)
class StepRecord:
    """One step of a search, before its update."""

    step: int
    """Updates made before it."""
    loss: float
    """Mean cross entropy over the batch, in nats; of a model without classes 1 - cosine of the features."""
    flops_loss: float
    """The FLOPs term, its weight included."""
    accuracy: float
    """Share of the batch whose most probable class is its label (the uncompressed model's, without labels); of a model
    without classes the mean cosine of its features and the uncompressed ones."""
    gflops: float
    lr: float
    after_pruning: tuple[int, ...] | None
    """Tokens that each block keeps after pruning; None in a family that is only merged."""
    after_merging: tuple[int, ...]
    """Tokens that each block keeps after merging."""


@dataclass(frozen=True)
class SearchHistory:
    """Records of evenly spaced steps, and of the last one.

    Attributes:
        steps: the length of the search.
        tokens: tokens that enter each block when nothing is compressed.
        records: in the order of their steps, not all of a long search.
    """

    target_gflops: float
    uncompressed_gflops: float
    steps: int
    tokens: tuple[int, ...]
    records: tuple[StepRecord, ...] = ()

    def wants(self, step: int) -> bool:
        """Whether a step is among those that are recorded."""
        return is_recorded(step, self.steps)

    def with_record(self, record: StepRecord) -> SearchHistory:
        return replace(self, records=(*self.records, record))

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SearchHistory:
        """From what ``dataclasses.asdict`` makes of a history."""
        records = tuple(StepRecord(**record) for record in content["records"])
        return cls(**{**content, "tokens": tuple(content["tokens"]), "records": records})


def kept_after(schedule: Schedule) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """A schedule's numbers as a record holds them."""
    after_pruning = None if schedule.after_pruning is None else tuple(schedule.after_pruning)
    return after_pruning, tuple(schedule.after_merging)
