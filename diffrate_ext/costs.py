"""What a model's parts cost: multiply-accumulates as a function of kept tokens (as DiffRate counts them).

Counted as in DeiT, ToMe and DiffRate: matrix products and convolutions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockCost:
    """Multiply-accumulates of one block: ``N * attention + N^2 * pairs`` before compression, ``N * mlp`` after it."""

    attention: int
    pairs: int
    mlp: int


@dataclass(frozen=True)
class StageCost:
    """Consecutive blocks that ``tokens`` tokens enter, and what comes before them (``fixed``)."""

    tokens: int
    fixed: int
    blocks: tuple[BlockCost, ...]


@dataclass(frozen=True)
class ModelCost:
    """What a model costs as a function of the tokens it keeps; ``head_per_token`` is paid by each token at the end."""

    stages: tuple[StageCost, ...]
    head: int
    head_per_token: int = 0

    def total(self, kept: Sequence[Sequence[Any]]) -> Any:
        """Multiply-accumulates for one image, given the tokens left after each block of each stage.

        Tokens are whole numbers or, in the rate search, 0-d tensors with a gradient; so is the result.
        """
        total: Any = self.head
        for stage, numbers in zip(self.stages, kept, strict=True):
            total += stage.fixed
            tokens = stage.tokens
            for block, left in zip(stage.blocks, numbers, strict=True):
                total += tokens * block.attention + tokens * tokens * block.pairs
                tokens = left
                total += tokens * block.mlp
        return total + tokens * self.head_per_token
