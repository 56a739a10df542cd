"""A schedule by a simple rule, where no learned one is at hand."""

from __future__ import annotations

from torch import nn

from ..errors import InputError, InputValueError
from ..methods import Method, method_of
from ..models import adapter_for
from ..schedule import Schedule
from .flops import flops
from .targets import gflops_of, share_meant

SHARES = (0.80, 0.65, 0.50)
"""Of the uncompressed model's FLOPs: the targets when nobody names others."""


def uniform_schedule(model: nn.Module, gflops: float | str, *, method: str | Method = "diffrate") -> Schedule:
    """A schedule of so many GFLOPs by a method's usual rule.

    - ``"diffrate"`` and ``"random"`` remove the same number of tokens in every block that the paper compresses. Up to
      rounding, DiffRate prunes half of them and merges half; in a hierarchical model it merges all. Its option
      ``operations`` may say that all are pruned, or all are merged.
    - ``"tome"`` merges the same number in every block, as long as there are so many to merge.
    - ``"evit"`` keeps the same share of the patches in the blocks after each quarter of the depth, DynamicViT in those
      that have a predictor, by default the same.

    The GFLOPs are as near to ``gflops`` as whole tokens allow: within 1 % but for models of few tokens.

    Args:
        model: a supported model (docs/models.md).
        gflops: multiply-accumulates of one image, in units of 1e9; or a share of the uncompressed model's, such as
            ``"60%"``.
        method: whose schedule it will be, as for :func:`compress`.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: the method cannot run the model, or ``gflops`` is more than the uncompressed model takes or
            less than the rule can reach.
    """
    adapter, method = adapter_for(model), method_of(method)
    stages, cost = adapter.stages, adapter.cost
    method.check(adapter, [stage.all_tokens for stage in stages])

    def flops_of(strength: float) -> int:
        return cost.total([method.uniform(stage, strength) for stage in stages])

    target = gflops_of(model, gflops) * 1e9
    if not flops_of(1) * 0.99 <= target <= flops_of(0) * 1.01:
        raise InputValueError(
            f"{target / 1e9:g} GFLOPs cannot be reached: the model takes {flops_of(0) / 1e9:.4g} uncompressed, and "
            f"{flops_of(1) / 1e9:.4g} with as few tokens as a uniform schedule can keep"
            + share_meant(target / 1e9, flops_of(0) / 1e9)
        )
    low, high = 0.0, 1.0  # FLOPs fall with the strength, in steps
    for _ in range(50):
        middle = (low + high) / 2
        if flops_of(middle) > target:
            low = middle
        else:
            high = middle
    strength = min((low, high), key=lambda strength: abs(flops_of(strength) - target))

    after_pruning, after_merging = [], []
    for stage in stages:
        tokens = stage.tokens
        for kept in method.uniform(stage, strength):
            after_pruning.append(kept + (tokens - kept) // 2)
            after_merging.append(kept)
            tokens = kept
    return Schedule(
        after_pruning if adapter.prunes and method.prunes_and_merges else None,
        after_merging,
        prefix=adapter.rules.prefix,
        grid=stages[0].grid,
        model=adapter.name,
        stages=[len(stage.blocks) for stage in stages] if len(stages) > 1 else None,
        method=str(method),
    )


def is_uniform(model: nn.Module, schedule: Schedule) -> bool:
    """Whether a schedule is what its method's rule gives for as many FLOPs."""
    adapter = adapter_for(model)
    kept = adapter.kept_numbers(schedule)
    try:
        rule = uniform_schedule(model, flops(model, schedule) / 1e9, method=schedule.method)
    except InputError:  # a method that cannot be named, or FLOPs that the rule does not reach
        return False
    return adapter.kept_numbers(rule) == kept
