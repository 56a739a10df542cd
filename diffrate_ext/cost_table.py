"""What a model's blocks cost in time, as a function of their tokens, on the machine where that was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputValueError

FORMAT = "diffrate cost table, version 1"


@dataclass(frozen=True)
class StageTimes:
    """Of one block among others of the same shape, in milliseconds for a batch, at several numbers of tokens."""

    blocks: int
    per_token: int
    """Multiply-accumulates of a block for each token, and..."""
    per_pair: int
    """...for each pair of tokens."""
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

    def flops(self, tokens: int) -> int:
        """Multiply-accumulates of one image in a block that keeps so many tokens."""
        return tokens * self.per_token + tokens**2 * self.per_pair

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

    def _at(self, times: tuple[float, ...], tokens: Any) -> Any:
        """On straight lines between the numbers that were measured; outside of them as at the nearest.

        The gradient of a tensor is that of a line over a quarter of the range: from one number to the next, time may
        stand still and jump, and a search has to see further.
        """
        if not isinstance(tokens, Tensor):
            return float(np.interp(tokens, self.tokens, times))
        reach, here = self.entering / 8, tokens.detach()
        slope = (self._read(times, here + reach) - self._read(times, here - reach)) / (2 * reach)
        return self._read(times, here) + slope.clamp_min(0) * (tokens - here)

    def _read(self, times: tuple[float, ...], tokens: Tensor) -> Tensor:
        """The same for a tensor (0-d) without a gradient, where it is."""
        known = _row(self.tokens, tokens.dtype, tokens.device)
        values = _row(times, tokens.dtype, tokens.device)
        if len(self.tokens) == 1:
            return values[0]
        upper = torch.searchsorted(known, tokens, right=True).clamp(1, len(self.tokens) - 1)
        low, high = known[upper - 1], known[upper]
        share = ((tokens - low) / (high - low)).clamp(0, 1)
        return values[upper - 1].lerp(values[upper], share)


@lru_cache(maxsize=64)  # made once: within a CUDA graph nothing can be copied from the host
def _row(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


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
    gflops: float
    """Of the uncompressed model: what tells models of one shape from others."""
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
            stages = tuple(map(_stage, content.pop("stages")))
            assert set(content) == {field.name for field in fields(cls)} - {"stages"}
            table = cls(**content, stages=stages)
            assert all(map(_is_whole, (table.batch_size, table.threads)))
            assert all(map(_is_time, (table.gflops, table.fixed, table.uncompressed)))
            return table
        except FileNotFoundError:
            raise
        except Exception as error:
            raise InputValueError(f"{path} is not a cost table as diffrate profile writes it") from error


def _stage(content: dict[str, Any]) -> StageTimes:
    values: dict[str, Any] = {name: tuple(row) if isinstance(row, list) else row for name, row in content.items()}
    stage = StageTimes(**values)
    for times in (stage.attention, stage.reduction, stage.mlp):
        assert len(times) == len(stage.tokens)
        assert all(map(_is_time, times))
    assert all(map(_is_whole, (stage.blocks, stage.per_token, stage.per_pair, *stage.tokens)))
    assert list(stage.tokens) == sorted(set(stage.tokens))
    assert stage.tokens[-1] == stage.entering
    return stage


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf
