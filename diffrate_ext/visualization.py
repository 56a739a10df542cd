"""Pictures of what a compressed model does to the tokens: which it drops, and which it merges into which."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .compression.compress import check_made_for, token_slots
from .compression.copies import compressed_copy
from .compression.flops import flops
from .compression.uniform import is_uniform
from .errors import InputValueError
from .images.data_config import data_config
from .models import adapter_for
from .painting import (
    HIGHLIGHTS,
    PRUNED,
    PRUNED_COLOUR,
    SINGLE,
    STROKE,
    Paint,
    enlarge,
    group_colour,
    group_ids,
    largest_groups,
    paint_tokens,
)
from .plotting import CURVES, INK
from .predictions import Predictions, predictions
from .token_charts import plot_counts, plot_fates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .schedule import Schedule

CHANGED = CURVES[0]
"""The colour of a prediction that compression changed."""
CHARTS_WIDTH, WORDS_WIDTH = 5.2, 1.45  # inches


def visualize(
    model: nn.Module,
    images: Tensor,
    schedule: Schedule,
    *,
    others: Sequence[Schedule] = (),
    names: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    paint: Paint = "mean",
    charts: bool = True,
    title: str | None = None,
    any_model: bool = False,
) -> Figure:
    """Draw what happens to the tokens of some images under a schedule.

    One row for each image: the image, then the image after several blocks, as in the paper (figure 6). Patches that
    look as in the image are tokens of their own; outlined patches of one flat colour were merged into one token; black
    hatched patches are pruned. A merged token's patches need not touch: those of the largest tokens of each image have
    outlines of one bright colour. At the end of the row stands what the model says of the image before and after
    compression: its class, or without classes the cosine of its features.

    Beside them, over all blocks: the number of tokens under each schedule, and how many of the patches of these images
    are tokens of their own, merged, or pruned.

    Args:
        model: a model that :func:`diffrate_ext.compress` supports. It is left as it is.
        images: (B, C, H, W), normalised as the model expects them.
        schedule: the schedule to draw.
        others: further schedules, for the plot only.
        names: what to call the schedule and the others. Default: "uniform" where it is its method's simple rule.
        blocks: after which blocks to draw, counted from 1 (of a hierarchical model: the attention blocks of the first
            stage that has them). Default: four, evenly spread, without the last, where little is left to see.
        titles: one text for each image.
        class_names: by index. Default: those of ImageNet for timm's models that have its classes, else numbers.
        paint: "mean": a merged token has the mean colour of its pixels, so that the image stays recognisable. "hue": it
            is tinted in a hue of its own, which it keeps through the blocks.
        charts: False leaves them out.
        title: what to call the model. Default: timm's name of it.
        any_model: draw a schedule although it says that it was made for another model.

    Returns:
        a matplotlib figure (``figure.savefig(path)`` writes it), made without pyplot: nothing global changes.

    Raises:
        InputValueError: no images, images of another size than the model's, blocks that the model does not have,
            another number of titles than of images, of names than of schedules or of class names than of classes, or
            a schedule for another model.
        InputTypeError, InputValueError: as :func:`diffrate_ext.compress`, for a model or schedule that does not fit.
    """
    from matplotlib.figure import Figure

    schedules = [schedule, *others]
    if images.ndim != 4 or len(images) == 0:
        raise InputValueError(f"images must have shape (B, C, H, W) with B >= 1, got {tuple(images.shape)}")
    if titles is not None and len(titles) != len(images):
        raise InputValueError(f"got {len(titles)} titles for {len(images)} images")
    if names is not None and len(names) != len(schedules):
        raise InputValueError(f"got {len(names)} names for {len(schedules)} schedules")
    if paint not in get_args(Paint):
        raise InputValueError(f"paint must be one of {', '.join(get_args(Paint))}, got {paint!r}")
    if not any_model:
        check_made_for(model, schedule)
    compressed = compressed_copy(model, schedule)
    slots = [block.cpu() for block in token_slots(compressed, images)]
    adapter = adapter_for(model)
    stage, prefix = adapter.stages[0], adapter.rules.prefix
    depth, n_tokens = len(stage.blocks), stage.tokens
    if slots[0].shape[1] != n_tokens:
        raise InputValueError(
            f"images of {images.shape[-2]} x {images.shape[-1]} pixels become {slots[0].shape[1]} tokens; only images "
            f"of the model's own size, of {n_tokens} tokens, can be drawn"
        )
    if blocks is None:
        blocks = sorted({math.ceil(depth * part / 5) for part in range(1, 5)})
    elif not blocks or not all(1 <= block <= depth for block in blocks):
        raise InputValueError(f"blocks must be numbers from 1 to {depth}, got {list(blocks)}")
    if names is None:
        names = [schedule_name(model, one, "schedule") for one in schedules]
    # (images, blocks, patches)
    ids = np.stack(
        [group_ids(torch.stack([s[row, prefix:] for s in slots[:depth]]).numpy()) for row in range(len(images))]
    )

    rows, columns = len(images), 1 + len(blocks)
    side = 2.2 if rows <= 2 else 1.72  # inches, of one image
    left_width = side * columns + WORDS_WIDTH
    height = side * rows + 1.6
    figure = Figure(
        figsize=(left_width + CHARTS_WIDTH, max(height, 6.0)) if charts else (left_width, height),
        layout="constrained",
        facecolor="white",
    )
    figure.suptitle(_heading(model, schedule, names[0], title), fontsize=13, fontweight="bold", color=INK)
    if charts:
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(left_width, CHARTS_WIDTH))[0]
        upper, lower = right.subplots(2, 1, height_ratios=(1.25, 1))
        plot_counts(upper, right, model, list(zip(names, schedules, strict=True)))
        plot_fates(lower, ids)
    else:
        left = figure.subfigures()
    axes = left.subplots(rows, columns, squeeze=False)
    for row, picture in enumerate(displayable(model, images)):
        whole = enlarge(picture, stage.grid)
        _show(axes[row, 0], whole)
        drawn = ids[row, [block - 1 for block in blocks]]
        for axis, after in zip(axes[row, 1:], drawn, strict=True):
            _show(axis, paint_tokens(whole, after.reshape(stage.grid), paint, largest_groups(drawn)))
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], fontsize=9, color=INK)
    axes[0, 0].set_title(f"input\n{n_tokens} tokens", fontsize=10, color=INK)
    for axis, block in zip(axes[0, 1:], blocks, strict=True):
        axis.set_title(f"after block {block}\n{n_kept(slots[block - 1][0])} tokens", fontsize=10, color=INK)
    _write_predictions(axes[:, -1], predictions(model, compressed, images, class_names))
    _draw_key(left, paint, ids[:, [block - 1 for block in blocks]])
    return figure


def schedule_name(model: nn.Module, schedule: Schedule, otherwise: str) -> str:
    """What to call a schedule in a picture: "uniform" if it is, with its method where that is not DiffRate."""
    if not is_uniform(model, schedule):
        return otherwise
    return "uniform" if schedule.method == "diffrate" else f"{schedule.method}, uniform"


def n_kept(slots: Tensor) -> int:
    """Number of tokens that slots (N,) stand for."""
    return len(slots[slots >= 0].unique())


def displayable(model: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """Normalised images (B, C, H, W) as RGB (B, H, W, 3) in [0, 1].

    Those of one channel that are mostly black, such as Fashion-MNIST's, come as dark grey on white: black is pruned.
    """
    config = data_config(model)
    mean, std = (torch.tensor(config[name], dtype=torch.float64).reshape(-1, 1, 1) for name in ("mean", "std"))
    pixels = (images.detach().cpu().double() * std + mean).clamp(0, 1)
    if pixels.shape[1] == 1 and pixels.mean() < 0.5:
        pixels = 1 - 0.7 * pixels
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).numpy()


def check_output(path: str | Path) -> Path:
    """The path, if a figure can be written there: better said before the work than after it.

    Raises:
        FileNotFoundError: its folder does not exist.
        PermissionError: it may not be written there.
        InputValueError: it is a folder, or matplotlib does not write files of that kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder for the picture {path} does not exist")
    if path.is_dir():
        raise InputValueError(f"the picture {path} cannot be written: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"the picture {path} cannot be written: no permission")
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise InputValueError(f"the picture {path} must end in one of: {', '.join('.' + kind for kind in kinds)}")
    return path


def _show(axes: Axes, picture: NDArray[np.float64]) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():  # where the image ends that is white at its edge
        spine.set(color="#cccccc", linewidth=0.6)


def _heading(model: nn.Module, schedule: Schedule, name: str, title: str | None) -> str:
    cost, uncompressed = flops(model, schedule) / 1e9, flops(model) / 1e9
    called = title or adapter_for(model).name or type(model).__name__
    method = "DiffRate, " if schedule.method == "diffrate" else ""  # others are part of the name
    return f"{called}, {method}{name} schedule: {cost:.3g} of {uncompressed:.3g} GFLOPs ({cost / uncompressed:.0%})"


def _write_predictions(axes: Sequence[Axes], said: Predictions) -> None:
    """To the right of the last picture of each row."""
    heading: dict[str, Any] = {"fontsize": 10, "color": INK, "transform": axes[0].transAxes}
    axes[0].text(1.05, 1.03, said.heading, va="bottom", **heading)
    for axis, prediction in zip(axes, said.of_images, strict=True):
        place: dict[str, Any] = {"fontsize": 9.5, "transform": axis.transAxes}
        if prediction.before is not None:
            before = f"before:\n{textwrap.fill(prediction.before, 18)}"
            axis.text(1.05, 0.54, before, va="bottom", color=INK, **place)
        after = textwrap.fill(prediction.after, 18)
        if prediction.before is not None:
            after = f"after:\n{after}"
        weight, colour = ("bold", CHANGED) if prediction.changed else ("normal", INK)
        axis.text(1.05, 0.46, after, va="top", color=colour, weight=weight, **place)


def _draw_key(figure: Any, paint: Paint, ids: NDArray[np.int64]) -> None:
    """What the marks mean, of those that are there."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    labels = []
    if (ids == SINGLE).any():
        handles.append(Line2D([], [], linestyle="none"))
        labels.append("as in the input: a token of its own")
    if (ids > SINGLE).any() and paint == "mean":
        handles.append(Patch(facecolor="none", edgecolor="#8a8a8a"))
        labels.append("one flat colour, outlined: merged into one token")
        handles.append(tuple(Patch(facecolor="none", edgecolor=colour, linewidth=2) for colour in HIGHLIGHTS))
        labels.append("the largest tokens of an image: one colour for each")
    elif (ids > SINGLE).any():
        colours = [group_colour(number) for number in (1, 2, 3)]
        handles.append(tuple(Patch(facecolor=(*colour, 0.6), edgecolor=colour) for colour in colours))
        labels.append("merged: one hue, one token")
    if (ids == PRUNED).any():
        handles.append(Patch(facecolor=tuple(PRUNED_COLOUR), edgecolor=tuple(STROKE), linewidth=0, hatch="/////"))
        labels.append("pruned")
    figure.legend(
        handles,
        labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.3)},
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
