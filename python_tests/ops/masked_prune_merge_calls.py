"""Calls of masked_prune_merge for its tests, and what they must give for the operator's own order and matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor
from typing import Any

import hypothesis.strategies as st
import torch
from oracles import sorted_positions
from strategies import CPU, FEATURES, TokenCase, token_cases
from torch import Tensor

from diffrate_ext import reference

ALIVE = ("all", "some", "one patch", "anywhere")


@dataclass(frozen=True)
class Call:
    """Tokens of which some are masked already, and the numbers to keep of the others.

    "anywhere": masked tokens may be important, and sorted before others that are alive. Numbers count as the nearest
    whole ones, halves as the larger.
    """

    case: TokenCase
    alive: str
    kept_p: float
    kept_m: float
    size_rule: str = "cosine"

    def mask(self, device: torch.device = CPU) -> Tensor:
        """The same number alive in every image, and all of the prefix."""
        case = self.case
        patches = case.tokens - case.prefix
        left = {"all": patches, "one patch": min(1, patches)}.get(self.alive, (2 * patches + 2) // 3)
        random = torch.rand(case.images, patches, generator=torch.Generator().manual_seed(case.seed + 5))
        mask = torch.ones(case.images, case.tokens, dtype=case.wide)
        mask[:, case.prefix :] = (random.argsort(1).argsort(1) < left).to(case.wide)
        return mask.to(device)

    def importance(self, device: torch.device = CPU) -> Tensor:
        """Tokens that are masked are the least important, as masked_attention has it, and so sorted last."""
        case = self.case
        if self.alive == "anywhere":
            return case.importance(device)
        values = case.importance()
        patches = values[:, values.shape[1] - (case.tokens - case.prefix) :]
        lowest = torch.where(self.mask()[:, case.prefix :] > 0, patches.nan_to_num(nan=-1e30, neginf=-1e30), -torch.inf)
        return torch.cat([values[:, : values.shape[1] - lowest.shape[1]], lowest.to(values.dtype)], 1).to(device)

    def probabilities(self) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.case.seed + 6)
        first, second = torch.rand(2, self.case.tokens, generator=random).to(self.case.wide)
        return first, second

    def kept(self) -> tuple[Tensor, Tensor]:
        first, second = torch.tensor([self.kept_p, self.kept_m], dtype=self.case.wide)
        return first, second

    def inputs(self, device: torch.device) -> list[Any]:
        rates = [tensor.to(device) for tensor in (*self.probabilities(), *self.kept())]
        return [self.case.x(device), self.mask(device), self.importance(device), self.case.size(device), *rates]

    @property
    def options(self) -> dict[str, Any]:
        return {"prefix": self.case.prefix, "size_rule": self.size_rule}

    def order(self) -> Tensor:
        return sorted_positions(self.case.patch_importance(self.importance()), self.case.prefix)

    def numbers(self) -> tuple[int, int, int]:
        """Tokens alive before, after pruning, and after merging."""
        last = int(self.mask()[0].sum()) if self.case.images else self.case.tokens
        middle = min(last, floor(self.kept_p + 0.5))
        return last, middle, min(middle, floor(self.kept_m + 0.5))


@st.composite
def calls(draw: st.DrawFn, features: tuple[str, ...] = FEATURES) -> Call:
    case = draw(token_cases(features=features, least_tokens=1))
    least, most = case.prefix + 1, case.tokens + 3  # more than there are: nothing to do
    kept_m = draw(st.sampled_from([least, draw(st.integers(least, max(least, most)))]))
    kept_p = draw(st.sampled_from([case.prefix, kept_m, draw(st.integers(case.prefix, max(least, most))), most]))
    fractions = st.sampled_from([0.0, 0.0, 0.25, 0.5, 0.75])
    kept_p, kept_m = kept_p + draw(fractions), kept_m + draw(fractions)
    return Call(case, draw(st.sampled_from(ALIVE)), kept_p, kept_m, draw(st.sampled_from(["cosine", "sum"])))


def given_choices(call: Call, order: Tensor, dst: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """x, mask and size, given the order and the matching: plain sums over whole rows, differentiable."""
    last, middle, left = call.numbers()
    position = torch.arange(call.case.tokens)

    def compute(
        x: Tensor, mask: Tensor, size: Tensor, prune_prob: Tensor, merge_prob: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, mask, size = reference.gather_tokens(x, order), mask.gather(1, order), size.gather(1, order)
        for first, end, probability in ((middle, last, prune_prob), (left, middle, merge_prob)):
            if first < end:
                hard = ((position < first) | (position >= end)).to(mask.dtype)
                mask = mask * (hard + (probability - probability.detach()))
        if left < middle:
            unit = torch.nn.functional.normalize(x.detach().to(dtype), dim=-1)
            cosine = (unit * reference.gather_tokens(unit, dst)).sum(-1)
            source = (position >= left) & (position < middle)
            gained = torch.where(source, size * cosine, size) if call.size_rule == "cosine" else size
            gained = torch.where(position < middle, gained.clamp_min(1), gained)
            size = gained.scatter_add(1, dst[:, left:middle], gained[:, left:middle])
            x = torch.where((position < left)[:, None], reference.merge_reduce(x, dst, call.case.tokens), x)
        return x, mask, size

    return compute
