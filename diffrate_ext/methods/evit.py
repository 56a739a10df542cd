"""EViT: in a few blocks the patches with the most class attention stay, and the others are fused into one token
(Liang et al., "Not All Patches are What You Need", ICLR 2022, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import InputValueError
from ..models.adapter import Adapter, Stage, TokenRules
from ..models.compressed import Step, TokenState
from ..schedule import KeptNumbers
from .method import Method, after_each_quarter, shares_kept


class FuseInattentive(Step):
    """The last of the kept tokens is the sum of what does not stay, by class attention."""

    def __init__(self, rules: TokenRules, k_m: int, before: TokenState) -> None:
        self.rules, self.k_m, self.before = rules, k_m, before

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        removes, prefix = self.k_m < q.shape[2], self.rules.prefix
        out, self.importance = ops.proportional_attention(
            q, k, v, None, scale=scale, prefix=prefix, importance_from="class" if removes else None
        )
        return out

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x + branch
        self.after = self.before  # no token counts for more than one
        if self.importance is None:
            self.slot = None
            return x
        prefix, stay = self.rules.prefix, self.k_m - 1
        tokens, _, order = ops.sort_tokens(x, self.importance, prefix=prefix)
        weights = self.importance.gather(1, order[:, stay:] - prefix)
        with torch.autocast(x.device.type, enabled=False):  # which would round what is summed
            fused = (weights[:, None] @ tokens[:, stay:].to(weights.dtype)).to(x.dtype)
        self.source = order[:, : self.k_m]  # the fused token is where the most attentive of its tokens was
        position = torch.arange(x.shape[1], device=x.device).clamp_max(stay)
        self.slot = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
        return torch.cat([tokens[:, :stay], fused], dim=1)


@dataclass(frozen=True)
class EViT(Method):
    """Pruning only, but what is pruned leaves its weighted sum behind. The fused token counts as one of the kept."""

    name: ClassVar[str] = "evit"

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:
        if adapter.rules.importance_from != "class":
            raise InputValueError(f"EViT goes by the attention of a class token, which this {adapter.family} lacks")
        prefix, fewest = adapter.rules.prefix, min(after for kept in numbers for _, after in kept)
        if fewest <= prefix:
            raise InputValueError(
                f"EViT keeps the prefix and one fused token, {prefix + 1} tokens, or more; the schedule has {fewest}"
            )

    def step(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> Step:
        return FuseInattentive(rules, k_m, before)

    def uniform(self, stage: Stage, strength: float) -> list[int]:
        """In the blocks after each quarter of the depth (4, 7 and 10 of 12) the same share of the patches."""
        return shares_kept(stage, strength, after_each_quarter(len(stage.blocks)), added=1)
