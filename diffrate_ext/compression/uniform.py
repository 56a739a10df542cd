"""A schedule by a simple rule, where no learned one is at hand."""

from __future__ import annotations

from torch import nn

from ..cost_table import CostTable
from ..errors import InputError
from ..methods import Method, method_of
from ..models import adapter_for
from ..schedule import Schedule
from .costing import Costing, check_method, costing_of
from .flops import flops
from .free_tokens import keep_free_tokens

SHARES = (0.80, 0.65, 0.50)
"""Of the uncompressed model's FLOPs: the targets when nobody names others."""


def uniform_schedule(
    model: nn.Module,
    gflops: float | str | None = None,
    *,
    method: str | Method = "diffrate",
    speedup: float | None = None,
    latency: float | None = None,
    costs: CostTable | None = None,
) -> Schedule:
    """A schedule of so many GFLOPs, or of so much time, by a method's usual rule.

    - ``"diffrate"`` and ``"random"`` remove the same number of tokens in every block that the paper compresses. Up to
      rounding, DiffRate prunes half of them and merges half; in a hierarchical model it merges all. Its option
      ``operations`` may say that all are pruned, or all are merged.
    - ``"tome"`` merges the same number in every block, as long as there are so many to merge.
    - ``"evit"`` keeps the same share of the patches in the blocks after each quarter of the depth, DynamicViT in those
      that have a predictor, by default the same.

    Of a target of time it keeps tokens that cost none, where time falls in steps.

    The GFLOPs are as near to ``gflops`` as whole tokens allow: within 1 % but for models of few tokens. So is the time.

    Args:
        model: a supported model (docs/models.md).
        gflops: multiply-accumulates of one image, in units of 1e9; or a share of the uncompressed model's, such as
            ``"60%"``.
        method: whose schedule it will be, as for :func:`compress`.
        speedup: in place of GFLOPs, how many times as fast as uncompressed the model is to be, by ``costs``.
        latency: in place of GFLOPs, what a batch is to take, in milliseconds, by ``costs``.
        costs: of :func:`profile_model`.

    Raises:
        InputTypeError: the model's family is not supported; there is not one target, or no cost table for it.
        InputValueError: the method cannot run the model; the target is more than the uncompressed model takes or less
            than the rule can reach; the costs are of another model or method.
    """
    costing, method = costing_of(model, costs), method_of(method)
    check_method(costs, method)
    target = costing.target(gflops, speedup=speedup, latency=latency)
    schedule = schedule_by_rule(costing, target, method)
    return schedule if costs is None else keep_free_tokens(model, schedule, costs)


def schedule_by_rule(costing: Costing, target: float, method: Method) -> Schedule:
    """As :func:`uniform_schedule`, without the tokens that cost no time.

    Args:
        costing: of the model.
        target: counted as it counts.
        method: whose rule it is.
    """
    adapter, stages = costing.adapter, costing.adapter.stages
    method.check(adapter, [stage.all_tokens for stage in stages])

    def cost_of(strength: float) -> float:
        return costing.of([method.uniform(stage, strength) for stage in stages])

    if not cost_of(1) * 0.99 <= target <= cost_of(0) * 1.01:
        raise costing.unreachable(target, cost_of(1), "with as few tokens as a uniform schedule can keep")
    low, high = 0.0, 1.0  # the cost falls with the strength, in steps
    for _ in range(50):
        middle = (low + high) / 2
        if cost_of(middle) > target:
            low = middle
        else:
            high = middle
    strength = min((low, high), key=lambda strength: abs(cost_of(strength) - target))

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
