"""A plot of a cost table: time by tokens, beside what FLOPs would let one expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plotting import CURVES, INK, OWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .cost_table import CostTable

_PIECES = (("attention", "attention half"), ("mlp", "MLP half"), ("reduction", "removing tokens"))


def draw_costs(table: CostTable) -> Figure:
    """Milliseconds of a block's pieces, and of a whole block beside its FLOPs, against the tokens in it.

    Args:
        table: of :func:`diffrate_ext.profile_model`.

    Returns:
        a matplotlib figure, made without pyplot: nothing global changes.
    """
    from matplotlib.figure import Figure

    stages = [stage for stage in table.stages if len(stage.tokens) > 1]
    figure = Figure(figsize=(11, 4.2 * len(stages) + 0.6), layout="constrained", facecolor="white")
    title = f"{table.model or 'model'}, one block, batch of {table.batch_size}, {table.dtype}\n{table.device}"
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    for (pieces, whole), stage in zip(figure.subplots(len(stages), 2, squeeze=False), stages, strict=True):
        for (name, label), colour in zip(_PIECES, CURVES, strict=False):
            pieces.plot(stage.tokens, getattr(stage, name), "o-", color=colour, markersize=3, label=label)
        block = [attention + mlp for attention, mlp in zip(stage.attention, stage.mlp, strict=True)]
        flops = [stage.flops(tokens) for tokens in stage.tokens]
        whole.plot(stage.tokens, block, "o-", color=OWN, markersize=3, label="measured")
        expected = [block[-1] * one / flops[-1] for one in flops]
        whole.plot(stage.tokens, expected, "--", color=INK, linewidth=1, label="as its FLOPs")
        for axis, words in ((pieces, "its pieces"), (whole, "a block that keeps all")):
            axis.set_title(words, fontsize=11)
            axis.set_xlabel("tokens")
            axis.set_ylabel("milliseconds")
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False)
    return figure
