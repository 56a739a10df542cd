"""What a block does where DiffRate's options differ from its defaults: compositions of the same operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .. import ops
from ..models.adapter import TokenRules
from ..models.compressed import TokenState
from ..numeric import wide_dtype
from ..ops.proportional_attention import class_rows
from .dropping import DropTokens, keep_order
from .masking import BlockRates, MaskGradient, MaskTokens

if TYPE_CHECKING:
    from .diffrate import DiffRate


class DropByChoice(DropTokens):
    """One block's tokens down to ``k_m``."""

    keys: Tensor | None = None

    def __init__(self, method: DiffRate, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> None:
        super().__init__(rules, k_m if method.operations == "prune" else k_p, k_m, before)
        self.method = method

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens = q.shape[2]
        if self.method.operations == "merge":
            self.k_p = tokens
        out = super().attend(q, k, v, scale)
        if self.k_m < tokens:
            if self.method.match == "keys":
                self.keys = k.detach().mean(1)
            if self.importance is not None and self.method.importance == "value_norm":
                self.importance = self.importance * _norms(v)  # by head: prune_merge takes the mean
            if self.method.importance == "random":
                self.importance = _random(q, self.rules.prefix)
        return out

    def _importance_from(self, q: Tensor, k: Tensor, v: Tensor) -> Literal["class", "class_rows", "received"] | None:
        if self.method.importance == "random" or self.k_m >= q.shape[2]:
            return None
        return "class_rows" if self.method.importance == "value_norm" else super()._importance_from(q, k, v)

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
        if self.keys is None and not self.method.merges_first:
            return super()._prune_merge(x, importance, size, order, prefix, residual, norm)
        x = x if residual is None else x + residual
        features, k_p, k_m = _matched(x, self.keys, order), self.k_p, self.k_m
        if self.method.merges_first:  # as many as prune_merge, but those that come last
            k_p, k_m = x.shape[1], x.shape[1] - (k_p - k_m)
        merged = ops.prune_merge(features, importance, k_p, k_m, size, prefix=prefix, size_rule=self.rules.size_rule)
        slot = torch.where(merged.slot < self.k_m, merged.slot, -1)
        return ops.MergedTokens(ops.merge_reduce(x, slot, self.k_m), merged.size[:, : self.k_m].contiguous(), slot)


class MaskByChoice(MaskTokens):
    """One block's tokens masked as its rates say."""

    keys: Tensor | None = None

    def __init__(
        self,
        method: DiffRate,
        rules: TokenRules,
        rates: BlockRates | None,
        before: TokenState,
        mask_gradient: MaskGradient,
    ) -> None:
        super().__init__(rules, rates, before, mask_gradient)
        self.method = method

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = super().attend(q, k, v, scale)
        if self.rates is None:
            return out
        if self.method.match == "keys":
            self.keys = k.detach().mean(1)
        prefix, state = self.rules.prefix, self.before.on(q.device)
        mask = None if state.mask is None else state.mask.detach()
        if self.method.importance == "value_norm":
            size = state.size if mask is None else mask if state.size is None else state.size * mask
            rows = class_rows(q.detach(), k.detach(), size, scale)
            self.importance = (rows * _norms(v)).mean(1)[:, prefix:]
        elif self.method.importance == "random":
            self.importance = _random(q, prefix)
        else:
            return out
        if mask is not None:  # what is masked comes last
            self.importance = self.importance.masked_fill(mask[:, prefix:] == 0, -1.0)
        return out

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
        features = _matched(x, self.keys, order)
        first = rates.without_pruning() if self.method.merges_first else rates
        merged = super()._prune_merge(features, mask, importance, size, order, prefix, first)
        x = x.gather(1, merged.order[..., None].expand_as(x))
        place = torch.arange(x.shape[1], device=x.device)
        means = ops.merge_reduce(x, merged.dst, x.shape[1])
        x = torch.where((merged.dst == place)[..., None], means, x)  # what went elsewhere stays, masked
        mask, size = merged.mask, merged.size
        if self.method.merges_first:
            last = rates.without_merging()
            x, mask, size, *_ = super()._prune_merge(x, mask, keep_order(size, prefix), size, None, prefix, last)
        return ops.MaskedTokens(x, mask, size, merged.order, merged.dst)


def _norms(v: Tensor) -> Tensor:
    """(B, H, N) of values (B, H, N, D)."""
    return torch.linalg.vector_norm(v.detach(), dim=-1, dtype=wide_dtype(v))


def _random(q: Tensor, prefix: int) -> Tensor:
    return torch.rand(q.shape[0], q.shape[2] - prefix, device=q.device)


def _matched(x: Tensor, keys: Tensor | None, order: Tensor | None) -> Tensor:
    """What is to be similar: the features, or the keys in the order that x is in."""
    if keys is None:
        return x.detach()
    return keys if order is None else keys.gather(1, order[..., None].expand_as(keys))
