"""A plot of :func:`diffrate_ext.compare`: what is kept of the model against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .errors import InputValueError
from .plotting import CURVES, INK, OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .comparison import Compared

MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_comparison(rows: Sequence[Compared], title: str) -> Figure:
    """Accuracy (without labels agreement, without a head the cosine) and cosine, against GFLOPs and speed-up.

    Args:
        rows: as :func:`diffrate_ext.compare` returns them.
        title: what the model is called.

    Returns:
        a matplotlib figure, made without pyplot: nothing global changes.

    Raises:
        InputValueError: there is no compressed model among the rows.
    """
    from matplotlib.figure import Figure

    first, *others = rows
    if not others:
        raise InputValueError("there is no compressed model to draw")
    measures = [(name, value) for name, value in _MEASURES if value(first) is not None]
    figure = Figure(figsize=(11, 4.0 * len(measures) + 0.6), layout="constrained", facecolor="white")
    figure.suptitle(f"{title}, {first.evaluation.n:,} images", fontsize=13, fontweight="bold", color=INK)
    axes = figure.subplots(len(measures), 2, squeeze=False, sharey="row")
    curves = list(dict.fromkeys(_curve(row) for row in others))
    for panels, (name, value) in zip(axes, measures, strict=True):
        for axis, (label, cost) in zip(panels, _COSTS, strict=True):
            _draw(axis, rows, curves, cost, value)
            axis.set_xlabel(label)
        panels[0].set_ylabel(name)
        if value is not _cosine:
            panels[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        panels[0].invert_xaxis()  # to the right: more compression, as beside it
        panels[1].xaxis.set_major_formatter("{x:.3g}x")
    # not inside the axes: there is no corner that no curve passes through
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure


def _draw(
    axis: Axes,
    rows: Sequence[Compared],
    curves: Sequence[str],
    cost: Callable[[Compared], float],
    value: Callable[[Compared], float | None],
) -> None:
    first, *others = rows
    axis.axhline(value(first) or 0, color=OWN, linestyle=":", zorder=1)
    axis.plot([cost(first)], [value(first) or 0], "o", color=OWN, label=first.method)
    for index, curve in enumerate(curves):
        points = sorted((cost(row), value(row)) for row in others if _curve(row) == curve)
        # with markers of their own, they can be told apart without colours, too
        color, marker = CURVES[index % len(CURVES)], MARKERS[index % len(MARKERS)]
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=curve, markersize=6)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _curve(row: Compared) -> str:
    """What a row is drawn with: its method's uniform schedules, or by itself."""
    return f"{row.method}, uniform" if row.uniform else row.label


def _cosine(row: Compared) -> float:
    return row.cosine


_MEASURES: tuple[tuple[str, Callable[[Compared], float | None]], ...] = (
    ("top-1 accuracy", lambda row: row.evaluation.top1),
    (
        "agreement (same class as uncompressed)",
        lambda row: None if row.evaluation.top1 is not None else row.evaluation.agreement,
    ),
    ("cosine to uncompressed features", _cosine),
)
_COSTS: tuple[tuple[str, Callable[[Compared], float]], ...] = (
    ("GFLOPs of an image, fewer to the right", lambda row: row.gflops),
    ("speed-up over uncompressed", lambda row: 1.0 if row.speed is None else row.speed.speed_up),
)
