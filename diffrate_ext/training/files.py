"""The folder of a run of training: files that are whole or not there, and the checkpoint that a stopped one needs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, ClassVar, TypeAlias

import torch

from ..errors import InputValueError
from ..schedule import Schedule

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


class OutputFolder:
    """Where a run of training keeps its files.

    Args:
        path: the folder; it is made when the first file is written.
    """

    what: ClassVar[str]
    """What runs here, for messages: "search"."""
    format_version: ClassVar[int]
    """Of the checkpoint."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"
        self.schedule = self.path / "schedule.json"
        self.history = self.path / "history.json"

    @property
    def started(self) -> bool:
        """Whether a run has left something here."""
        return self.checkpoint.exists() or self.schedule.exists()

    def check(self, *, resume: bool) -> None:
        """Raise when nothing can be written here: better before the work than after it.

        Raises:
            FileExistsError: there is a run already, and it is not to be resumed.
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
        if not resume and self.started:
            raise FileExistsError(
                f"{self.path} holds a {self.what} already: continue it with --resume (resume=True), or name another "
                "folder"
            )

    def write_checkpoint(self, content: Mapping[str, Any], fingerprint: Mapping[str, Fact], history: str) -> None:
        """Write the checkpoint, and the history beside it as JSON."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"format_version": self.format_version, "fingerprint": dict(fingerprint), **content}
        with replacing(self.checkpoint) as temporary:
            torch.save(content, temporary)
        with replacing(self.history) as temporary:
            temporary.write_text(history, encoding="utf-8")

    def read_checkpoint(self, fingerprint: Mapping[str, Fact]) -> dict[str, Any] | None:
        """What the checkpoint in this folder holds; None when there is none.

        Raises:
            InputValueError: the checkpoint is none, or it belongs to a run with another fingerprint.
        """
        if not self.checkpoint.exists():
            return None
        file = BytesIO(self.checkpoint.read_bytes())  # what cannot be read is another error than what is damaged
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zip files and pickles raise almost anything on damaged files
            raise InputValueError(f"{self.checkpoint} is not the checkpoint of a {self.what} ({error})") from error
        if not isinstance(content, dict) or content.get("format_version") != self.format_version:
            raise InputValueError(
                f"{self.checkpoint} is not the checkpoint of a {self.what} in format version {self.format_version}"
            )
        self._compare(content["fingerprint"], fingerprint, self.may_differ(content, fingerprint))
        return content

    def may_differ(self, content: Mapping[str, Any], fingerprint: Mapping[str, Fact]) -> Collection[str]:
        """The facts in which a run that goes on from a checkpoint may differ from the one before."""
        return ()

    def save_schedule(self, schedule: Schedule) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.schedule) as temporary:
            schedule.save(temporary)

    def _compare(self, then: Mapping[str, Fact], now: Mapping[str, Fact], free: Collection[str]) -> None:
        names = sorted(key for key in (then.keys() | now.keys()) - set(free) if then.get(key) != now.get(key))
        if names:
            differences = "; ".join(f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in names)
            raise InputValueError(
                f"the {self.what} in {self.path} was started differently and cannot be continued so ({differences}): "
                "resume it with the same settings, or name another folder"
            )
