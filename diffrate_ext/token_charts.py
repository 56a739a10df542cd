"""Charts of what becomes of tokens, block by block: how many are left, and where the patches are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .compression.flops import flops
from .models import adapter_for
from .painting import PRUNED, SINGLE, STROKE
from .plotting import CURVES, INK, OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .schedule import Schedule

MERGED_COLOUR = "#e3d9c6"


def plot_counts(axes: Axes, figure: Any, model: nn.Module, schedules: Sequence[tuple[str, Schedule]]) -> None:
    """Tokens after each block under named schedules, the first of which the pictures show."""
    adapter = adapter_for(model)
    uncompressed = flops(model)
    entering = adapter.stages[0].tokens
    full = [entering, *(stage.tokens for stage in adapter.stages for _ in stage.blocks)]
    axes.plot(
        full,
        color="#8a8a8a",
        linestyle=(0, (4, 3)),
        linewidth=1.4,
        label=f"uncompressed, {uncompressed / 1e9:.3g} GFLOPs",
    )
    costs = [flops(model, schedule) for _, schedule in schedules]
    labels = _distinct(
        [
            f"{name}: {cost / 1e9:.3g} GFLOPs ({cost / uncompressed:.0%})"
            for (name, _), cost in zip(schedules, costs, strict=True)
        ]
    )
    labels[0] += ", shown"
    dearest_first = sorted(range(len(schedules)), key=lambda index: -costs[index])
    for number, index in enumerate(dearest_first):
        kept = adapter.kept_numbers(schedules[index][1])
        axes.plot(
            [entering, *(merged for numbers in kept for _, merged in numbers)],
            color=CURVES[number % len(CURVES)],
            marker="o",
            markersize=3.6,
            linewidth=2.6 if index == 0 else 1.5,
            label=labels[index],
        )
    axes.set_title("tokens after each block", fontsize=11, color=INK)
    axes.set_ylim(0, 1.06 * max(full))
    _style(axes, len(full) - 1)
    # not inside the axes: there is no corner that no schedule passes through
    columns = 1 if max(map(len, labels)) > 32 else 2
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False, labelcolor=INK)


def plot_fates(axes: Axes, ids: NDArray[np.int64]) -> None:
    """Shares of the patches that are tokens of their own, merged or pruned.

    Args:
        ids: (images, blocks, patches) as :func:`~diffrate_ext.painting.group_ids` numbers them.
    """
    patches = ids.shape[2]
    fates: list[tuple[str, str, NDArray[np.bool_]]] = [
        ("a token of its own", OWN, ids == SINGLE),
        ("merged with others", MERGED_COLOUR, ids > SINGLE),
        ("pruned", "black", ids == PRUNED),
    ]
    there = [(label, colour, fate.mean((0, 2))) for label, colour, fate in fates if label == fates[0][0] or fate.any()]
    # before the first block every patch is a token of its own
    shares = np.array([[label == fates[0][0], *share] for label, _, share in there], dtype=float)
    areas = axes.stackplot(
        range(shares.shape[1]),
        100 * shares,
        colors=[colour for _, colour, _ in there],
        labels=[label for label, _, _ in there],
        edgecolor="white",
    )
    if there[-1][0] == "pruned":
        areas[-1].set(hatch="///", edgecolor=tuple(STROKE), linewidth=0)
    axes.legend(loc="lower left", fontsize=9, labelcolor=INK)
    axes.set_title(f"where the {patches} patches are, % (mean of these images)", fontsize=11, color=INK)
    axes.set_xlabel("block (0: input)", fontsize=9.5, color=INK)
    axes.set_ylim(0, 100)
    _style(axes, shares.shape[1] - 1)


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels, with a number after each that was there before."""
    return [
        label if label not in labels[:place] else f"{label} ({labels[:place].count(label) + 1})"
        for place, label in enumerate(labels)
    ]


def _style(axes: Axes, depth: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, depth)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
