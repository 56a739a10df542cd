"""A plot of speed by batch size or tokens, in each way to run a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .plotting import CURVES, INK, OWN
from .running import WAYS
from .speed import Speed, axis_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = dict(zip(WAYS, ("-", "--", ":"), strict=True))
_MARKERS = dict(zip(WAYS, ("o", "s", "^"), strict=True))


def draw_speeds(speeds: Sequence[Speed], title: str) -> Figure:
    """Images per second, and the speed-up over the uncompressed model run in the same way.

    Where batch sizes and numbers of tokens both vary, there is a row of panels for each number of tokens.

    Args:
        speeds: what :func:`measure_speed` measured, at least one.
        title: the model and the machine.

    Returns:
        a matplotlib figure, made without pyplot: nothing global changes.
    """
    from matplotlib.figure import Figure

    axis = axis_of(speeds)
    tokens = list(dict.fromkeys(speed.tokens for speed in speeds))
    groups = [list(speeds)] if axis == "tokens" else [[one for one in speeds if one.tokens == n] for n in tokens]
    figure = Figure(figsize=(11, 4.2 * len(groups) + 0.9), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (rates, gains), group in zip(panels, groups, strict=True):
        _draw(rates, gains, group)
        where = "" if len(groups) == 1 else f", {group[0].tokens} tokens"
        for panel, words in ((rates, "images per second"), (gains, "speed-up over uncompressed, run alike")):
            panel.set_title(words + where, fontsize=11)
            panel.set_xlabel(axis)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({one.at(axis) for one in group}))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        rates.set_ylim(bottom=0)
        gains.yaxis.set_major_formatter("{x:.3g}x")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure


def _draw(rates: Axes, gains: Axes, speeds: Sequence[Speed]) -> None:
    axis = axis_of(speeds)
    gains.axhline(1.0, color=OWN, linewidth=1.5, zorder=1)
    names = list(dict.fromkeys(one.name for one in speeds))
    for way in dict.fromkeys(one.way for one in speeds):
        line: dict[str, Any] = {"linestyle": _LINES[way], "marker": _MARKERS[way], "markersize": 5}
        for index, name in enumerate(names):
            row = sorted((one for one in speeds if (one.name, one.way) == (name, way)), key=lambda one: one.at(axis))
            places = [one.at(axis) for one in row]
            if index == 0:
                plain = [one.measured.uncompressed_images_per_second for one in row]
                rates.plot(places, plain, color=OWN, label=f"uncompressed, {way}", **line)
            color = CURVES[index % len(CURVES)]
            rates.plot(
                places, [one.measured.images_per_second for one in row], color=color, label=f"{name}, {way}", **line
            )
            low, high = zip(*(one.measured.speed_up_quartiles for one in row), strict=True)
            gains.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
            gains.plot(places, [one.measured.speed_up for one in row], color=color, **line)
