"""What happened during a fine-tuning, in a bounded number of records, and the folder that keeps it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import nn

from ..training.files import OutputFolder, replacing
from ..training.records import is_recorded, readable_json
from .quality import Quality


@dataclass(frozen=True)
class FinetuneRecord:
    """One step, before its update."""

    step: int
    """Updates made before it."""
    loss: float
    accuracy: float
    """Share of the batch whose most probable class is its label (the uncompressed model's, without labels), drop path
    included; of a model without classes the mean cosine of its features and the uncompressed ones."""
    gradient: float
    """Norm of the gradient, before it was shortened."""
    lr: float
    """Of this step, for the images in it."""


@dataclass(frozen=True)
class FinetuneHistory:
    """Records of evenly spaced steps, and of the last one."""

    steps: int
    records: tuple[FinetuneRecord, ...] = ()

    def with_record(self, record: FinetuneRecord) -> FinetuneHistory:
        """With this record, if its step is among those that are kept."""
        return replace(self, records=(*self.records, record)) if is_recorded(record.step, self.steps) else self

    def to_json(self, **qualities: Quality | None) -> str:
        found = {name: None if quality is None else asdict(quality) for name, quality in qualities.items()}
        records = [
            {
                "step": record.step,
                "loss": record.loss,
                "accuracy": record.accuracy,
                "gradient_norm": record.gradient,
                "learning_rate": record.lr,
            }
            for record in self.records
        ]
        return readable_json({"steps": self.steps, "records": records, **found})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FinetuneHistory:
        """From what ``dataclasses.asdict`` makes of a history."""
        return cls(content["steps"], tuple(FinetuneRecord(**record) for record in content["records"]))


class FinetuneFolder(OutputFolder):
    """Where a fine-tuning keeps its files."""

    what: ClassVar[str] = "fine-tuning"
    format_version: ClassVar[int] = 1

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.weights = self.path / "model.safetensors"

    def save_weights(self, model: nn.Module) -> None:
        """Write the model's weights as timm and :func:`load_timm_model` read them."""
        from safetensors.torch import save

        # copies: the format knows no shared memory
        state = {name: values.detach().cpu().clone().contiguous() for name, values in model.state_dict().items()}
        with replacing(self.weights) as temporary:
            temporary.write_bytes(save(state))  # save_file makes a file that only its owner may read

    def save_history(self, history: str) -> None:
        with replacing(self.history) as temporary:
            temporary.write_text(history, encoding="utf-8")
