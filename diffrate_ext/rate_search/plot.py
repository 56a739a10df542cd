"""A picture of a search: how its schedule came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InputValueError
from ..plotting import CURVES, INK, OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from ..schedule import Schedule
    from .history import SearchHistory

LOSS, ACCURACY, SEARCHED = CURVES[3], CURVES[2], CURVES[0]
KEPT, MERGED, PRUNED = "#33608f", "#e0952b", "#d9d6d0"


def draw_search(history: SearchHistory, schedule: Schedule, cost: float) -> Figure:
    """Draw how a search went, and the schedule that came out.

    Above, over the steps: the tokens that leave each block, and how many each block prunes and merges. Below: the final
    schedule, the cost beside the target, loss and accuracy on the batches with their running means.

    Args:
        history: at least one record of the search.
        schedule: what it found.
        cost: of the model under this schedule, in the unit of the target.

    Returns:
        a matplotlib figure, made without pyplot: nothing global changes.

    Raises:
        InputValueError: the history is empty.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history.records:
        raise InputValueError("the search has no records to draw")
    steps = np.array([record.step + 1 for record in history.records])
    left, pruned, merged = _counts(history)

    figure = Figure(figsize=(15, 8.2), layout="constrained", facecolor="white")
    figure.suptitle(
        f"Search for a schedule of {history.target:.4g} {history.unit} "
        f"({history.target / history.uncompressed:.0%} of the uncompressed "
        f"{history.uncompressed:.4g})",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    axes = figure.subplots(2, 3)
    _plot_left(axes[0, 0], figure, steps, left)
    most = max(int(pruned.max()), int(merged.max()), 1)
    _plot_removed(axes[0, 1], steps, pruned, most, "pruned")
    image = _plot_removed(axes[0, 2], steps, merged, most, "merged")
    bar = figure.colorbar(image, ax=axes[0, 1:], label="tokens that the block removes (white: none)", pad=0.02)
    bar.locator = MaxNLocator(integer=True)
    _plot_schedule(axes[1, 0], schedule, history.tokens)
    _plot_cost(axes[1, 1], steps, history, cost)
    _plot_loss(axes[1, 2], steps, history)
    for axis in axes.flat:
        axis.title.set_color(INK)
        axis.tick_params(labelsize=8, colors=INK)
    return figure


def _counts(history: SearchHistory) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens that leave, are pruned by and are merged by each block: (records, blocks) each."""
    tokens = np.array(history.tokens)
    merge = np.array([record.after_merging for record in history.records])
    enter = _entering(merge, tokens)
    prune = np.array([record.after_pruning or entered for record, entered in zip(history.records, enter, strict=True)])
    return merge, enter - prune, prune - merge


def _entering(merge: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens that enter each block (..., blocks), given those that leave it and those of the uncompressed model."""
    before = np.concatenate([np.broadcast_to(tokens[0], (*merge.shape[:-1], 1)), merge[..., :-1]], axis=-1)
    return np.where(np.diff(tokens, prepend=tokens[0]) != 0, tokens, before)  # another stage has another grid


def _plot_left(axis: Axes, figure: Figure, steps: NDArray[np.int64], left: NDArray[np.int64]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    blocks = left.shape[1]
    colours = colormaps["viridis_r"]
    norm = Normalize(1 - 0.15 * blocks, blocks)  # the palest yellow is hard to see on white
    for block in range(blocks):
        axis.plot(steps, left[:, block], color=colours(norm(block + 1)), linewidth=1.4)
    axis.set_title("tokens after each block", fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel("tokens")
    axis.set_ylim(0, None)
    _plain(axis)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axis, label="block", pad=0.02)
    bar.ax.set_ylim(1, blocks)
    bar.ax.invert_yaxis()


def _plot_removed(axis: Axes, steps: NDArray[np.int64], removed: NDArray[np.int64], most: int, how: str) -> AxesImage:
    """A row for each block, a column for each step: the darker, the more tokens the block removes."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    blocks = removed.shape[1]
    shades = colormaps["magma_r"](np.linspace(0, 1, 256))
    shades[0] = 1  # white, so that none is told from few
    image = axis.imshow(
        removed.T,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(shades),
        vmin=0,
        vmax=most,
        extent=(0.5, steps[-1] + 0.5, blocks + 0.5, 0.5),
    )
    if not removed.any():
        axis.text(0.5, 0.5, f"no tokens are {how}", transform=axis.transAxes, ha="center", color=INK)
    axis.set_title(f"tokens {how} by each block", fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel("block")
    axis.set_yticks(_some_blocks(blocks))
    return image


def _plot_schedule(axis: Axes, schedule: Schedule, tokens: Sequence[int]) -> None:
    blocks = np.arange(1, len(schedule) + 1)
    merge = np.array(schedule.after_merging)
    enter = _entering(merge, np.array(tokens))
    prune = enter if schedule.after_pruning is None else np.array(schedule.after_pruning)
    axis.bar(blocks, merge, color=KEPT, label="kept")
    for removed, bottom, colour, label in (
        (prune - merge, merge, MERGED, "merged"),
        (enter - prune, prune, PRUNED, "pruned"),
    ):
        if removed.any():
            axis.bar(blocks, removed, bottom=bottom, color=colour, label=label)
    axis.set_title("the schedule found", fontsize=11)
    axis.set_xlabel("block")
    axis.set_ylabel("tokens")
    axis.set_xticks(_some_blocks(len(blocks)))
    axis.set_ylim(0, 1.13 * max(tokens))
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    _plain(axis)


def _plot_cost(axis: Axes, steps: NDArray[np.int64], history: SearchHistory, cost: float) -> None:
    target, searched = history.target, [record.cost for record in history.records]
    axis.axhline(target, color=OWN, linestyle="--", linewidth=1.2, label=f"target: {target:.4g}")
    axis.plot(steps, searched, color=SEARCHED, linewidth=1.6, label="search")
    axis.plot(steps[-1], cost, "o", color=INK, markersize=6, label=f"schedule found: {cost:.4g}", clip_on=False)
    axis.set_title(f"{history.unit} beside the target", fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylabel(history.unit)
    # at least so much: what whole tokens leave off the target is to look as small as it is
    low, high = (f(0.95 * target, 1.05 * target, cost, *searched) for f in (min, max))
    axis.set_ylim(low - 0.1 * (high - low), high + 0.25 * (high - low))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    _plain(axis)


def _plot_loss(axis: Axes, steps: NDArray[np.int64], history: SearchHistory) -> None:
    measure = history.measure
    curves = [(axis, [record.loss for record in history.records], LOSS)]
    axis.set_xlabel("step")
    if measure == "cosine":
        axis.set_title("on the batches: loss (bold: running mean)", fontsize=11)
        axis.set_ylabel("1 - cosine to the uncompressed features", color=LOSS)
    else:
        axis.set_title(f"on the batches: loss and {measure} (bold: running mean)", fontsize=11)
        axis.set_ylabel("loss (cross entropy)", color=LOSS)
        beside = axis.twinx()
        beside.set_ylabel(
            "agreement (same class as uncompressed)" if measure == "agreement" else "accuracy", color=ACCURACY
        )
        beside.yaxis.set_major_formatter("{x:.0%}")
        beside.tick_params(labelsize=8, colors=INK)
        curves.append((beside, [record.accuracy for record in history.records], ACCURACY))
    for axis_, values, colour in curves:
        axis_.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axis_.plot(steps, _running_mean(np.array(values)), color=colour, linewidth=1.8)
        axis_.spines["top"].set_visible(False)
        axis_.margins(x=0.015, y=0.1)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over a tenth of the records on either side, or as many as there are."""
    reach = max(1, len(values) // 20)
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _some_blocks(blocks: int) -> NDArray[np.int64]:
    return np.arange(1, blocks + 1, max(1, blocks // 12))


def _plain(axis: Axes) -> None:
    axis.margins(x=0.015)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
