"""The folder of a search: files that are whole or not there, and the state that a stopped search continues from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputValueError
from ..schedule import Schedule
from .history import SearchHistory

FORMAT_VERSION = 2

Fact: TypeAlias = str | int | float | bool | None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the ``with`` block ends well.

    Whenever the process or the machine stops, ``path`` is either what it was before or all of the new file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # the new name, too, must reach the disk
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class SearchState:
    """All that a search needs to go on after ``step`` steps as if it had never stopped."""

    step: int
    logits: dict[str, Tensor]
    optimizer: dict[str, Any]
    history: SearchHistory


class SearchFolder:
    """Where a search keeps its files.

    Args:
        path: the folder; it is made when the first file is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"
        self.schedule = self.path / "schedule.json"
        self.history = self.path / "history.json"
        self.plot = self.path / "search.png"

    def check(self, *, resume: bool) -> None:
        """Raise when a search cannot be written here: better before the work than after it.

        Raises:
            FileExistsError: there is a search already, and it is not to be resumed.
            NotADirectoryError: the path, or a part of it, is a file.
            PermissionError: nothing may be written there.
        """
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"the output folder {self.path} cannot be made: {existing} is a file")
        try:  # permissions alone do not tell: a file system may be read-only, or full
            with NamedTemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise PermissionError(f"the output folder {self.path} cannot be written: {error.strerror}") from error
        if not resume and (self.checkpoint.exists() or self.schedule.exists()):
            raise FileExistsError(
                f"{self.path} holds a search already: continue it with --resume (resume=True), or name another folder"
            )

    def save_state(self, state: SearchState, fingerprint: Mapping[str, Fact]) -> None:
        """Write the checkpoint, and the history beside it as JSON."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": dict(fingerprint),
            "step": state.step,
            "logits": state.logits,
            "optimizer": state.optimizer,
            "history": asdict(state.history),
        }
        with replacing(self.checkpoint) as temporary:
            torch.save(content, temporary)
        with replacing(self.history) as temporary:
            temporary.write_text(state.history.to_json(), encoding="utf-8")

    def load_state(self, fingerprint: Mapping[str, Fact]) -> SearchState | None:
        """The state of the search in this folder; None when there is none.

        Raises:
            InputValueError: the checkpoint is none, or it belongs to a search with another fingerprint.
        """
        if not self.checkpoint.exists():
            return None
        file = BytesIO(self.checkpoint.read_bytes())  # what cannot be read is another error than what is damaged
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zip files and pickles raise almost anything on damaged files
            raise InputValueError(f"{self.checkpoint} is not the checkpoint of a search ({error})") from error
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise InputValueError(
                f"{self.checkpoint} is not the checkpoint of a search in format version {FORMAT_VERSION}"
            )
        _compare(content["fingerprint"], fingerprint, self.path)
        history = SearchHistory.from_dict(content["history"])
        return SearchState(content["step"], content["logits"], content["optimizer"], history)

    def save_schedule(self, schedule: Schedule) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.schedule) as temporary:
            schedule.save(temporary)

    def load_schedule(self) -> Schedule | None:
        """The schedule that a finished search left; None while it is not finished."""
        return Schedule.load(self.schedule) if self.schedule.exists() else None


def _compare(then: Mapping[str, Fact], now: Mapping[str, Fact], folder: Path) -> None:
    names = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if names:
        differences = "; ".join(f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in names)
        raise InputValueError(
            f"the search in {folder} was started differently and cannot be continued so ({differences}): "
            "resume it with the same settings, or name another folder"
        )
