"""Cost tables of tiny models that nobody measured."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from diffrate_ext import CostTable, flops
from diffrate_ext.cost_table import StageTimes
from diffrate_ext.models import adapter_for


def table_of(
    model: nn.Module,
    *,
    attention: Callable[[int], float] = lambda tokens: 0.1 * tokens,
    reduction: Callable[[int], float] = lambda tokens: 0.05,
    mlp: Callable[[int], float] = lambda tokens: 0.2 * tokens,
    fixed: float = 1.0,
    every: int = 1,
    method: str = "diffrate",
) -> CostTable:
    """Milliseconds by formulas, at every so many tokens."""
    adapter, stages = adapter_for(model), []
    for stage, cost in zip(adapter.stages, adapter.cost.stages, strict=True):
        tokens = tuple(sorted({*range(stage.fewest, stage.tokens, every), stage.tokens}))
        rows = (tuple(float(time(n)) for n in tokens) for time in (attention, reduction, mlp))
        block = cost.blocks[0]
        stages.append(
            StageTimes(len(stage.blocks), block.attention + block.mlp, block.pairs, stage.tokens, tokens, *rows)
        )
    return CostTable(
        model=adapter.name,
        method=method,
        batch_size=4,
        dtype="float32",
        device="a table",
        threads=1,
        versions={},
        prefix=adapter.rules.prefix,
        gflops=flops(model) / 1e9,
        fixed=fixed,
        stages=tuple(stages),
        uncompressed=100.0,
    )
