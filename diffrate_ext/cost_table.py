"""What a model's blocks cost in time, as a function of their tokens, on the machine where that was measured."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputValueError

FORMAT = "diffrate cost table, version 1"


@dataclass(frozen=True)
class StageTimes:
    """Of one block among others of the same shape, in milliseconds for a batch, at several numbers of tokens."""

    blocks: int
    entering: int
    """Tokens that enter the first of the blocks."""
    tokens: tuple[int, ...]
    """Numbers of tokens, rising; the last is ``entering``."""
    attention: tuple[float, ...]
    """From a block's beginning to its second norm, at so many tokens, where none of them goes."""
    reduction: tuple[float, ...]
    """What it takes more where tokens go."""
    mlp: tuple[float, ...]
    """The rest of the block, at so many tokens."""

    def total(self, left: Sequence[Any]) -> Any:
        """Milliseconds of the blocks, given the tokens left after each: whole numbers, or 0-d tensors."""
        total: Any = 0.0
        before: Any = self.entering
        for after in left:
            total += self._at(self.attention, before) + self._at(self.mlp, after)
            if isinstance(before, Tensor) or isinstance(after, Tensor):
                goes = torch.as_tensor(after < before)
                total = total + torch.where(goes, self._at(self.reduction, before), 0.0)
            elif after < before:
                total += self._at(self.reduction, before)
            before = after
        return total

    def _at(self, times: Sequence[float], tokens: Any) -> Any:
        """Between two numbers of tokens on a straight line; below the first as at the first."""
        if isinstance(tokens, Tensor):
            known, values = (torch.tensor(row, dtype=tokens.dtype, device=tokens.device) for row in (self.tokens, times))
            upper = torch.searchsorted(known, tokens.detach(), right=True).clamp(1, len(self.tokens) - 1)
            low, high = known[upper - 1], known[upper]
            share = ((tokens - low) / (high - low)).clamp_min(0)
            return values[upper - 1] + share * (values[upper] - values[upper - 1])
        if len(self.tokens) == 1:
            return times[0]
        upper = min(max(bisect_right(self.tokens, tokens), 1), len(self.tokens) - 1)
        low, high = self.tokens[upper - 1], self.tokens[upper]
        share = max((tokens - low) / (high - low), 0.0)
        return times[upper - 1] + share * (times[upper] - times[upper - 1])


@dataclass(frozen=True)
class CostTable:
    """What :func:`diffrate_ext.profile_model` measured. Times are milliseconds of one batch."""

    model: str | None
    method: str
    batch_size: int
    dtype: str
    device: str
    """The processor's or the GPU's name."""
    threads: int
    """Of torch on a CPU."""
    versions: dict[str, str]
    prefix: int
    """Class and register tokens."""
    fixed: float
    """All but the blocks: patch embedding, head, and what lies between stages."""
    stages: tuple[StageTimes, ...]
    uncompressed: float
    """The whole uncompressed model, measured."""

    def total(self, kept: Sequence[Sequence[Any]]) -> Any:
        """Milliseconds of a batch, given the tokens left after each block of each stage.

        Tokens are whole numbers or, in the rate search, 0-d tensors with a gradient; so is the result.
        """
        return self.fixed + sum(stage.total(left) for stage, left in zip(self.stages, kept, strict=True))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CostTable:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            InputValueError: it holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            assert content.pop("format") == FORMAT
            stages = tuple(
                StageTimes(**{name: tuple(row) if isinstance(row, list) else row for name, row in stage.items()})
                for stage in content.pop("stages")
            )
            assert set(content) == {field.name for field in fields(cls)} - {"stages"}
            return cls(**content, stages=stages)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise InputValueError(f"{path} is no cost table, as diffrate profile writes it") from error
