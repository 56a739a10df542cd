"""ToMe: in each block the tokens with the most similar keys are merged (Bolya et al., "Token Merging: Your ViT But
Faster", ICLR 2023, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import InputValueError
from ..models.adapter import Adapter, Stage, TokenRules
from ..models.compressed import Step, TokenState
from ..numeric import wide_dtype
from ..schedule import KeptNumbers
from .masking import BlockRates, MaskGradient
from .method import Method, Proxy
from .tome_search import MaskByKeys


class MergeByKeys(Step):
    """Every second token may merge into one of the others; those that are most similar do."""

    def __init__(self, rules: TokenRules, k_m: int, before: TokenState, proportional: bool) -> None:
        self.rules, self.k_m, self.before, self.proportional = rules, k_m, before, proportional

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens = k.shape[2]
        self.merged = min(tokens - self.k_m, most_merged(tokens, self.rules.prefix))
        # here, where the keys are at hand: kept until reduce, they would take memory meanwhile
        self.slot = ops.bipartite_match(k, self.merged, prefix=self.rules.prefix) if self.merged > 0 else None
        size = self.before.on(q.device).size if self.proportional else None
        return ops.proportional_attention(q, k, v, size, scale=scale, prefix=self.rules.prefix, importance_from=None)[0]

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.slot is None:
            self.after = self.before
            return x + branch
        size = self.before.on(x.device).size
        if size is None:
            size = torch.ones(x.shape[:2], dtype=wide_dtype(x), device=x.device)
        kept = x.shape[1] - self.merged
        if self.positions is not None:
            self.source = _destinations(self.slot, kept, self.rules.prefix)
        self.after = TokenState(size.new_zeros(size.shape[0], kept).scatter_add(1, self.slot, size))
        return ops.merge_reduce(x, self.slot, kept, weights=size, residual=branch)


def _destinations(slot: Tensor, kept: int, prefix: int) -> Tensor:
    """(B, kept): of the tokens that slot (B, N) puts into each place, the one that the others merged into."""
    token = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    first = torch.cat([token[:, :prefix], token[:, prefix + prefix % 2 :: 2]], 1)
    source = token.new_empty(slot.shape[0], kept).scatter_(1, slot.gather(1, first), first)
    odd = token[:, prefix + (prefix + 1) % 2 :: 2]  # none of which merges: they have the last word
    return source.scatter_(1, slot.gather(1, odd), odd)


def most_merged(tokens: Any, prefix: int) -> Any:
    """How many of so many tokens can merge at once: half of the patches, of which every second may merge.

    Tokens are a whole number or, in the search, a 0-d tensor.
    """
    return (tokens - prefix) // 2


@dataclass(frozen=True)
class ToMe(Method):
    """Merging only, by the similarity of keys among all tokens; no token is thought unimportant."""

    proportional_attention: bool = True
    """A merged token counts in attention for as many tokens as it is made of. The paper turns it off for models that
    were pretrained by MAE and not fine-tuned with it."""

    name: ClassVar[str] = "tome"

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:
        prefix, block = adapter.rules.prefix, 0
        for stage, kept in zip(adapter.stages, numbers, strict=True):
            before = stage.tokens
            for _, after in kept:
                fewest = before - most_merged(before, prefix)
                if after < fewest:
                    raise InputValueError(
                        f"ToMe merges at most half of a block's patches: block {block} has {before} tokens and keeps "
                        f"at least {fewest}, the schedule says {after}"
                    )
                before, block = after, block + 1

    def step(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> Step:
        return MergeByKeys(rules, k_m, before, self.proportional_attention)

    @property
    def proxies(self) -> tuple[Proxy, ...]:
        return ("merge",)

    def compressible(self, stage: Stage) -> tuple[bool, ...]:
        """As in the paper of DiffRate, and the first block. In the last block of a hierarchical model's stage no mask
        has an effect that a gradient could tell."""
        return any(stage.compressible), *stage.compressible[1:]

    def most_removed(self, tokens: Any, prefix: int) -> Any:
        return most_merged(tokens, prefix)

    def search_step(
        self,
        rules: TokenRules,
        rates: BlockRates | None,
        before: TokenState,
        mask_gradient: MaskGradient = "derivative",
    ) -> Step:
        return MaskByKeys(rules, rates, before, mask_gradient, self.proportional_attention)

    def uniform(self, stage: Stage, strength: float) -> list[int]:
        """The same number in every block of a stage that is compressed at all (r), as long as there are so many."""
        numbers, tokens = [], stage.tokens
        for index in range(len(stage.blocks)):
            wanted = stage.tokens - round(strength * stage.tokens * (index + 1) / 2)
            if any(stage.compressible):
                tokens = min(tokens, max(stage.fewest, tokens - most_merged(tokens, stage.prefix), wanted))
            numbers.append(tokens)
        return numbers
