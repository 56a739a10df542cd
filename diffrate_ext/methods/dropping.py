"""What a compressed block does: its tokens are sorted, pruned and merged (DiffRate, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..models.adapter import TokenRules
from ..models.compressed import Step, TokenState
from ..models.fusing import fusable_norm
from ..modes import is_traced
from ..ops.proportional_attention import has_kernel

_MOST_BY_ROWS = 2048
"""With more tokens, several blocks of prune_merge read all importances of an image: one mean is less than all rows."""


class DropTokens(Step):
    """One block's tokens down to ``k_p`` by pruning and to ``k_m`` by merging.

    A block that removes nothing needs neither importance nor order: sorting alone changes no token.
    """

    def __init__(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> None:
        self.rules, self.k_p, self.k_m, self.before = rules, k_p, k_m, before

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        size, importance_from = self.before.on(q.device).size, self._importance_from(q, k, v)
        out, self.importance = ops.proportional_attention(
            q, k, v, size, scale=scale, prefix=self.rules.prefix, importance_from=importance_from
        )
        return out

    def _importance_from(self, q: Tensor, k: Tensor, v: Tensor) -> Literal["class", "class_rows", "received"] | None:
        rules, tokens = self.rules, q.shape[2]
        if self.k_m >= tokens:
            return None
        if rules.importance_from == "class" and not rules.spares_most_important and has_kernel(q, k, v):
            return "class_rows" if tokens <= _MOST_BY_ROWS else "class"
        return rules.importance_from

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        return self._reduce(x, branch, None)[0]

    def reduce_and_norm(self, x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        by_compiler = self.importance is None and is_traced()  # which fuses a sum and a norm by itself
        x, normalized = self._reduce(x, branch, None if by_compiler else fusable_norm(norm, x, branch))
        return x, norm(x) if normalized is None else normalized

    def _reduce(self, x: Tensor, branch: Tensor, norm: ops.Norm | None) -> tuple[Tensor, Tensor | None]:
        rules, size, importance, order = self.rules, self.before.on(x.device).size, self.importance, None
        residual: Tensor | None = branch
        if importance is None:
            self.after, self.slot = self.before, None
            return (x + branch, None) if norm is None else ops.add_norm(x, branch, norm)
        prefix = rules.prefix
        if self.positions is not None:
            if importance.ndim == 3:  # the mean here, lest it be rounded another way there
                importance = importance.mean(1)
            self.source = ops.sort_tokens(x[..., :1].detach(), importance, prefix=prefix).order[:, : self.k_m]
        if rules.spares_most_important:  # in sorted order, as if the first token were a prefix
            x, size, order = ops.sort_tokens(x + branch, importance, size, prefix=prefix)
            prefix, residual, importance = 1, None, keep_order(size, 1)
        merged = self._prune_merge(x, importance, size, order, prefix, residual, norm)
        slot = merged.slot
        self.slot = slot if order is None else torch.empty_like(slot).scatter_(1, order, slot)
        self.after = TokenState(merged.size)
        return merged.x, merged.normalized if isinstance(merged, ops.NormalizedTokens) else None

    def _prune_merge(
        self,
        x: Tensor,
        importance: Tensor,
        size: Tensor | None,
        order: Tensor | None,
        prefix: int,
        residual: Tensor | None,
        norm: ops.Norm | None,
    ) -> ops.MergedTokens | ops.NormalizedTokens:
        """What is left of x + residual. ``order``: by which x was sorted since attention; None: it was not."""
        return ops.prune_merge(
            x,
            importance,
            self.k_p,
            self.k_m,
            size,
            prefix=prefix,
            size_rule=self.rules.size_rule,
            residual=residual,
            norm=norm,
        )


def keep_order(size: Tensor, prefix: int) -> Tensor:
    """An importance (B, N-P) for tokens, with sizes (B, N), that are in order already and shall stay so."""
    images, tokens = size.shape
    return torch.arange(tokens - prefix, 0, -1, dtype=size.dtype, device=size.device).expand(images, -1)
