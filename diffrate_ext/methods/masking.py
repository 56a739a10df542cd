"""The search step in a block: nothing is dropped, tokens are masked (DiffRate, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..models.adapter import TokenRules
from ..models.compressed import Step, TokenState
from .dropping import keep_order

MaskGradient = Literal["derivative", "difference"]
"""Of a masked token, as for :func:`diffrate_ext.ops.masked_attention`."""


@dataclass(frozen=True)
class BlockRates:
    """What one block keeps now, differentiable: numbers (0-d) and keep probabilities of the sorted positions (N).

    A method without one of the proxies keeps everything there.
    """

    prune_prob: Tensor
    merge_prob: Tensor
    kept_p: Tensor
    kept_m: Tensor

    def without_pruning(self) -> BlockRates:
        prob, kept = everything(self.prune_prob)
        return replace(self, prune_prob=prob, kept_p=kept)

    def without_merging(self) -> BlockRates:
        prob, kept = everything(self.merge_prob)
        return replace(self, merge_prob=prob, kept_m=kept)


def everything(prob: Tensor) -> tuple[Tensor, Tensor]:
    """Keep probabilities, like these (N), and the kept number of a proxy that removes nothing."""
    return torch.ones_like(prob), prob.new_full((), prob.shape[0])


class MaskTokens(Step):
    """One block's tokens masked as its rates say; a block without rates leaves all as they are."""

    importance: Tensor | None

    def __init__(
        self,
        rules: TokenRules,
        rates: BlockRates | None,
        before: TokenState,
        mask_gradient: MaskGradient = "derivative",
    ) -> None:
        self.rules, self.rates, self.before, self.mask_gradient = rules, rates, before, mask_gradient

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rules, state = self.rules, self.before.on(q.device)
        if state.mask is not None:
            out, self.importance = ops.masked_attention(
                q,
                k,
                v,
                state.mask,
                state.size,
                scale=scale,
                prefix=rules.prefix,
                importance_from=rules.importance_from,
                mask_gradient=self.mask_gradient,
            )
            return out
        # nothing is masked yet: fused attention computes the same
        importance_from = None if self.rates is None else rules.importance_from
        out, self.importance = ops.proportional_attention(
            q, k, v, state.size, scale=scale, prefix=rules.prefix, importance_from=importance_from
        )
        return out

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x + branch
        rules, rates, state, importance = self.rules, self.rates, self.before.on(x.device), self.importance
        if rates is None or importance is None:
            self.after, self.slot = self.before, None
            return x
        prefix, size, mask, order = rules.prefix, state.size, state.mask, None
        if rules.spares_most_important:  # in sorted order, as if the first token were a prefix
            x, size, order = ops.sort_tokens(x, importance, size, prefix=prefix)
            mask = None if mask is None else mask.gather(1, order)
            prefix, importance = 1, keep_order(size, 1)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=importance.dtype, device=x.device)
        x, mask, size, sorted_order, dst = self._prune_merge(x, mask, importance, size, order, prefix, rates)
        self.after = TokenState(size, mask)
        self.source = sorted_order if order is None else order
        self.slot = torch.empty_like(dst).scatter_(1, self.source, dst)
        return x

    def _prune_merge(
        self,
        x: Tensor,
        mask: Tensor,
        importance: Tensor,
        size: Tensor | None,
        order: Tensor | None,
        prefix: int,
        rates: BlockRates,
    ) -> ops.MaskedTokens:
        """``order``: by which x was sorted since attention; None: it was not."""
        return ops.masked_prune_merge(
            x,
            mask,
            importance,
            size,
            rates.prune_prob,
            rates.merge_prob,
            rates.kept_p,
            rates.kept_m,
            prefix=prefix,
            size_rule=self.rules.size_rule,
        )
