"""Schedules drawn at random, which a good one should beat (the paper's figure 5)."""

from __future__ import annotations

import torch

from diffrate_ext import Schedule
from diffrate_ext.methods import DiffRate, method_of
from diffrate_ext.models import adapter_for


def random_schedule(model: torch.nn.Module, gflops: float, *, method: str = "diffrate", seed: int = 0) -> Schedule:
    """A schedule of so many GFLOPs, as nearly as whole tokens allow.

    How what is removed is shared out among the blocks that the paper compresses, and in each between pruning and
    merging, is uniform over all ways.
    """
    adapter, chosen = adapter_for(model), method_of(method)
    (stage,) = adapter.stages
    generator = torch.Generator().manual_seed(seed)
    weights = -torch.rand(len(stage.blocks), generator=generator, dtype=torch.float64).log()  # exponential
    weights *= torch.tensor(stage.compressible)
    removed = (weights / weights.sum()).cumsum(0)
    pruned = torch.rand(len(stage.blocks), generator=generator, dtype=torch.float64).tolist()

    def kept(strength: float) -> list[int]:
        return [max(stage.fewest, stage.tokens - round(strength * stage.tokens * float(share))) for share in removed]

    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        if adapter.cost.total([kept(middle)]) > gflops * 1e9:
            low = middle
        else:
            high = middle
    after_merging = kept(high)
    before = [stage.tokens, *after_merging[:-1]]
    both = zip(before, after_merging, pruned, strict=True)
    after_pruning = [old - round(share * (old - new)) for old, new, share in both]
    prunes = isinstance(chosen, DiffRate) and chosen.prunes_and_merges
    return Schedule(
        after_pruning if prunes else None,
        after_merging,
        prefix=stage.prefix,
        grid=stage.grid,
        model=adapter.name,
        method=str(chosen),
    )
