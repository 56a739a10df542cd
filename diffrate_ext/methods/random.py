"""Random pruning: what every method should beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import InputValueError
from ..models.adapter import Adapter, TokenRules
from ..models.compressed import Step, TokenState
from ..schedule import KeptNumbers
from .dropping import DropTokens
from .method import Method


class DropAnyTokens(DropTokens):
    """One block's patches pruned at random, by torch's generator."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        images, _, tokens, _ = q.shape
        prefix = self.rules.prefix
        out, _ = ops.proportional_attention(q, k, v, None, scale=scale, prefix=prefix, importance_from=None)
        self.importance = torch.rand(images, tokens - prefix, device=q.device) if self.k_m < tokens else None
        return out


@dataclass(frozen=True)
class Random(Method):
    """Pruning only; ``torch.manual_seed`` makes it choose the same again."""

    name: ClassVar[str] = "random"

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:
        if not adapter.prunes:
            raise InputValueError(f"a {adapter.family} is only merged, and method 'random' prunes")

    def step(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> Step:
        return DropAnyTokens(rules, k_m, k_m, before)
