"""Figures 5 and 6 of the paper, on our subjects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffrate_ext.plotting import CURVES, INK
from diffrate_ext.predictions import class_names_of
from diffrate_ext.visualization import visualize

from .runs import Outcome, Run
from .subjects import Subject
from .tables import Form, Row, figure_5

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_figure_5(subject: Subject, form: Form, outcomes: Callable[[Row], list[Outcome]]) -> Figure:
    """Errors of searched schedules among uniform and random ones of the same FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained", facecolor="white")
    axis = figure.subplots()
    kinds = ("prune", "merge", "prune, then merge")
    marks = {"random": (".", 0.55, 60), "uniform": ("s", 1.0, 60), "learned": ("*", 1.0, 190)}
    rows = {row.label: outcomes(row) for row in figure_5(form).rows}
    for place, (kind, color) in enumerate(zip(kinds, CURVES, strict=False)):
        for way, (marker, alpha, size) in marks.items():
            errors = [float(outcome.errors.mean()) for outcome in rows[f"{kind}, {way}"]]
            # side by side, so that points of one height can be told apart
            spread = np.linspace(-0.25, 0.25, len(errors)) if way == "random" else np.zeros(len(errors))
            axis.scatter(place + spread, errors, s=size, marker=marker, color=color, alpha=alpha, linewidths=0)
    for way, (marker, alpha, size) in marks.items():
        axis.scatter([], [], s=size, marker=marker, color=INK, alpha=alpha, linewidths=0, label=way)
    axis.set_xticks(range(len(kinds)), ["pruning only", "merging only", "pruning, then merging"])
    axis.set_yscale("log")
    axis.set_ylabel("cross-entropy" if subject.has_classes else "1 - cosine to uncompressed")
    axis.set_title(f"Schedules at {form.share:.0%} of the FLOPs: lower is better", fontsize=11, color=INK)
    axis.grid(alpha=0.25, axis="y", which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure


def draw_figure_6(subject: Subject, form: Form, outcomes: Callable[[Row], list[Outcome]], pictures: int = 4) -> Figure:
    """What the learned schedule prunes and merges, block by block."""
    run = Run("diffrate", form.share, "learned", form.search_steps, form.search_images)
    (learned,) = outcomes(Row("", (run,)))
    images = []
    for batch in subject.test_batches():
        images.append(batch if isinstance(batch, torch.Tensor) else batch[0])
        if sum(map(len, images)) >= pictures:
            break
    assert learned.schedule is not None
    return visualize(
        subject.model,
        torch.cat(images)[:pictures],
        learned.schedule,
        names=["learned"],
        class_names=class_names_of(subject.model) or subject.judged_by().classes,
        title=subject.title,
    )
