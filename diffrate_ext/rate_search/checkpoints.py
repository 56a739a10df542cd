"""The folder of a search, and the state that a stopped search continues from."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..schedule import Schedule
from ..training.files import Fact, OutputFolder
from .history import SearchHistory


@dataclass(frozen=True)
class SearchState:
    """All that a search needs to go on after ``step`` steps as if it had never stopped."""

    step: int
    logits: dict[str, Tensor]
    optimizer: dict[str, Any]
    history: SearchHistory


class SearchFolder(OutputFolder):
    """Where a search keeps its files."""

    what: ClassVar[str] = "search"
    format_version: ClassVar[int] = 2

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.plot = self.path / "search.png"

    def may_differ(self, content: Mapping[str, Any], fingerprint: Mapping[str, Fact]) -> Collection[str]:
        """A search that was finished may go on to more steps, with the learning rates of a search of that length."""
        steps = fingerprint["steps"]
        finished = content["step"] == content["fingerprint"]["steps"]
        return ("steps", "lr", "min_lr") if finished and isinstance(steps, int) and steps > content["step"] else ()

    def save_state(self, state: SearchState, fingerprint: Mapping[str, Fact]) -> None:
        """Write the checkpoint, and the history beside it as JSON."""
        self.schedule.unlink(missing_ok=True)  # of a search that goes on after its end: it would pass for the new one
        content = {
            "step": state.step,
            "logits": state.logits,
            "optimizer": state.optimizer,
            "history": asdict(state.history),
        }
        self.write_checkpoint(content, fingerprint, state.history.to_json())

    def load_state(self, fingerprint: Mapping[str, Fact]) -> SearchState | None:
        """The state of the search in this folder; None when there is none.

        Raises:
            InputValueError: the checkpoint is none, or it belongs to a search with another fingerprint.
        """
        content = self.read_checkpoint(fingerprint)
        if content is None:
            return None
        history = SearchHistory.from_dict(content["history"])
        return SearchState(content["step"], content["logits"], content["optimizer"], history)

    def load_schedule(self) -> Schedule | None:
        """The schedule that a finished search left; None while it is not finished."""
        return Schedule.load(self.schedule) if self.schedule.exists() else None
