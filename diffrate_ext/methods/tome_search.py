"""ToMe in the search step: nothing is dropped, tokens that merged are masked, and how many merge has a gradient.

A position's keep probability belongs to a rank, as in DiffRate (section 3 of its paper): the tokens at even positions
stand behind all others in the order of removal, the one that would merge first last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models.adapter import TokenRules
from ..models.compressed import Step, TokenState
from ..numeric import wide_dtype
from .masking import BlockRates, MaskGradient


class MaskByKeys(Step):
    """One block's tokens merged and masked as its rates say; a block without rates leaves all as they are.

    Tokens that are alive stand as inference would have them, so that even and odd positions are the same; those that
    are masked stand behind them.
    """

    def __init__(
        self,
        rules: TokenRules,
        rates: BlockRates | None,
        before: TokenState,
        mask_gradient: MaskGradient,
        proportional: bool,
    ) -> None:
        self.rules, self.rates, self.before = rules, rates, before
        self.mask_gradient, self.proportional = mask_gradient, proportional

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rules, state = self.rules, self.before.on(q.device)
        self.keys = k.detach().mean(1)
        size, prefix = state.size if self.proportional else None, rules.prefix
        if state.mask is None:  # fused attention computes the same
            return ops.proportional_attention(q, k, v, size, scale=scale, prefix=prefix, importance_from=None)[0]
        source = rules.importance_from  # the operator gives one in any case
        options: dict[str, Any] = {"importance_from": source, "mask_gradient": self.mask_gradient}
        return ops.masked_attention(q, k, v, state.mask, size, scale=scale, prefix=prefix, **options)[0]

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x + branch
        if self.rates is None:
            self.after, self.slot = self.before, None
            return x
        state, (images, tokens) = self.before.on(x.device), x.shape[:2]
        wide = wide_dtype(x)
        mask = torch.ones(images, tokens, dtype=wide, device=x.device) if state.mask is None else state.mask
        size = torch.ones(images, tokens, dtype=wide, device=x.device) if state.size is None else state.size
        alive = mask.detach()[:1].sum().round()  # the same in every image
        kept = torch.minimum(self.rates.kept_m.detach().round().to(wide), alive)
        removal, place, slot = merge_by_keys(self.keys, alive.long(), kept.long(), self.rules.prefix)

        probability = self.rates.merge_prob.to(wide)[removal]
        # as in DiffRate, a block that removes nothing does not multiply its mask in
        probability = torch.where(kept < alive, probability, probability.detach())
        stays = (removal < kept) | (removal >= alive)
        mask = mask * (stays + (probability - probability.detach()))

        origin = torch.empty_like(place).scatter_(1, place, _positions(place))
        # what is masked keeps its features and size: attention asks what would change if it were there
        at_inference = (torch.arange(tokens, device=x.device) < kept).expand(images, -1)
        means = ops.merge_reduce(x, slot, tokens, weights=size)
        x = torch.where(at_inference[..., None], means, x.gather(1, origin[..., None].expand_as(x)))
        sums = torch.zeros_like(size).scatter_add(1, slot, size)
        self.after = TokenState(torch.where(at_inference, sums, size.gather(1, origin)), mask.gather(1, origin))
        self.slot, self.source = slot, origin
        return x


def merge_by_keys(keys: Tensor, alive: Tensor, kept: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching (section 3 of its paper) among the first ``alive`` tokens, on the device alone.

    Args:
        keys: what tokens are compared by (B, N, D).
        alive, kept: 0-d int64; at most half of the patches that are alive merge.
        prefix: P.

    Returns:
        three times (B, N) int64: a token's position in the order of removal, of which ``kept .. alive-1`` merge; its
        new position, where those that merge stand behind those that stay; and the new position of what it is part of.
    """
    images, tokens, _ = keys.shape
    position = torch.arange(tokens, device=keys.device)
    even, odd = position[prefix + prefix % 2 :: 2], position[prefix + (prefix + 1) % 2 :: 2]
    own = position.repeat(images, 1)
    if len(odd) == 0:
        return own, own, own

    unit = F.normalize(keys.to(wide_dtype(keys)), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):  # which would round the cosines
        cosine = unit[:, even] @ unit[:, odd].transpose(1, 2)
    cosine = cosine.nan_to_num(nan=-torch.inf).masked_fill(odd >= alive, -torch.inf)
    best, destination = cosine.max(-1)
    order = best.masked_fill(even >= alive, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # among equal ones, those that are masked are last: their positions are

    evens, merged = (even < alive).sum(), alive - kept
    merges, there = rank < merged, even < alive
    first_odd = prefix + evens - merged
    of_even = torch.where(merges, alive - 1 - rank, prefix - 1 + (~merges).cumsum(1))
    of_even = torch.where(there, of_even, even)
    of_odd = torch.where(odd < alive, first_odd + torch.arange(len(odd), device=keys.device), odd)
    into = torch.where(merges & there, first_odd + destination, of_even)
    removal_of_even = torch.where(there, alive - 1 - rank, even)
    removal_of_odd = torch.where(odd < alive, prefix + torch.arange(len(odd), device=keys.device), odd)

    back = torch.cat([position[:prefix], even, odd]).argsort()

    def in_place(of_even: Tensor, of_odd: Tensor) -> Tensor:
        return torch.cat([own[:, :prefix], of_even, of_odd.expand(images, -1)], dim=1)[:, back]

    return in_place(removal_of_even, removal_of_odd), in_place(of_even, of_odd), in_place(into, of_odd)


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
