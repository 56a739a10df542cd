"""A schedule by a simple rule, where no learned one is at hand."""

from __future__ import annotations

from torch import nn

from ..errors import InputValueError
from ..models import Stage, adapter_for
from ..schedule import Schedule


def uniform_schedule(model: nn.Module, gflops: float) -> Schedule:
    """A schedule of so many GFLOPs that removes the same number of tokens in every block but the first.

    Up to rounding, half of them by pruning and half by merging; in a hierarchical model, which is never pruned, all by
    merging. Blocks that the paper never compresses keep all tokens. The GFLOPs are as near to ``gflops`` as whole
    tokens allow: within 1 % but for models of few tokens.

    Args:
        model: one of timm's VisionTransformer or MetaFormer (CAFormer) models.
        gflops: multiply-accumulates of one image, in units of 1e9.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: ``gflops`` is more than the uncompressed model takes or less than the rule can reach.
    """
    adapter = adapter_for(model)
    stages, cost = adapter.stages, adapter.cost

    def flops_of(rate: float) -> int:
        return cost.total([_kept(stage, rate) for stage in stages])

    fastest, target = float(max(stage.tokens for stage in stages)), float(gflops) * 1e9
    if not flops_of(fastest) * 0.99 <= target <= flops_of(0) * 1.01:
        raise InputValueError(
            f"{gflops} GFLOPs cannot be reached: the model takes {flops_of(0) / 1e9:.4g} uncompressed, and "
            f"{flops_of(fastest) / 1e9:.4g} with all the tokens removed that this rule may remove"
        )
    low, high = 0.0, fastest  # tokens removed per block; FLOPs fall with it, in steps
    for _ in range(50):
        middle = (low + high) / 2
        if flops_of(middle) > target:
            low = middle
        else:
            high = middle
    rate = min((low, high), key=lambda rate: abs(flops_of(rate) - target))

    after_pruning, after_merging = [], []
    for stage in stages:
        tokens = stage.tokens
        for kept in _kept(stage, rate):
            after_pruning.append(kept + (tokens - kept) // 2)
            after_merging.append(kept)
            tokens = kept
    return Schedule(
        after_pruning if adapter.prunes else None,
        after_merging,
        prefix=adapter.rules.prefix,
        grid=stages[0].grid,
        model=adapter.name,
        stages=[len(stage.blocks) for stage in stages] if len(stages) > 1 else None,
    )


def _kept(stage: Stage, rate: float) -> list[int]:
    """Tokens kept by each block of a stage that removes ``rate`` tokens in every block that may compress."""
    numbers, compressing = [], 0
    for compressible in stage.compressible:
        compressing += compressible
        numbers.append(min(stage.tokens, max(stage.fewest, stage.tokens - round(rate * compressing))))
    return numbers
