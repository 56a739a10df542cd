"""What happened during a search, in a bounded number of records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..compression.costing import Unit
from ..schedule import Schedule
from ..training.records import Measure, is_recorded, readable_json


@dataclass(frozen=True)
class StepRecord:
    """One step of a search, before its update."""

    step: int
    """Updates made before it."""
    loss: float
    """Mean cross entropy over the batch, in nats; of a model without classes 1 - cosine of the features."""
    flops_loss: float
    """The term for the cost, its weight included."""
    accuracy: float
    """Share of the batch whose most probable class is its label (the uncompressed model's, without labels); of a model
    without classes the mean cosine of its features and the uncompressed ones."""
    cost: float
    """In the unit of the target."""
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
        measure: what their accuracy is.
        unit: of the target and of what is spent: GFLOPs of one image, or milliseconds of a batch by a cost table.
    """

    target: float
    uncompressed: float
    steps: int
    tokens: tuple[int, ...]
    records: tuple[StepRecord, ...] = ()
    measure: Measure = "accuracy"
    unit: Unit = "GFLOPs"

    def wants(self, step: int) -> bool:
        """Whether a step is among those that are recorded."""
        return is_recorded(step, self.steps)

    def with_record(self, record: StepRecord) -> SearchHistory:
        return replace(self, records=(*self.records, record))

    def extended_to(self, steps: int) -> SearchHistory:
        """The same for a search of so many steps; of its records those that a search of that length keeps."""
        return replace(self, steps=steps, records=tuple(r for r in self.records if is_recorded(r.step, steps)))

    def to_json(self) -> str:
        """For people and other programs: every number under the name of what it is."""
        cost = "gflops" if self.unit == "GFLOPs" else "milliseconds"
        return readable_json(
            {
                f"target_{cost}": self.target,
                f"uncompressed_{cost}": self.uncompressed,
                "steps": self.steps,
                "uncompressed_tokens_of_each_block": self.tokens,
                "records": [
                    {
                        "step": record.step,
                        "loss": record.loss,
                        "flops_loss": record.flops_loss,
                        self.measure: record.accuracy,
                        cost: record.cost,
                        "learning_rate": record.lr,
                        "tokens_after_pruning": record.after_pruning,
                        "tokens_after_merging": record.after_merging,
                    }
                    for record in self.records
                ],
            }
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SearchHistory:
        """From what ``dataclasses.asdict`` makes of a history."""
        records = tuple(StepRecord(**record) for record in content["records"])
        return cls(**{**content, "tokens": tuple(content["tokens"]), "records": records})


def kept_after(schedule: Schedule) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """A schedule's numbers as a record holds them."""
    after_pruning = None if schedule.after_pruning is None else tuple(schedule.after_pruning)
    return after_pruning, tuple(schedule.after_merging)
