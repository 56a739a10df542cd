"""Pictures of what a compressed model does to the tokens: which it drops, and which it merges into which."""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .compression.compress import check_made_for, token_slots
from .compression.copies import compressed_copy
from .compression.flops import flops
from .errors import InputValueError
from .images.data_config import data_config
from .models import adapter_for
from .plotting import CURVES, INK, OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .schedule import Schedule

PRUNED, SINGLE = -1, 0
"""Marks in :func:`group_ids` for patches that are gone, and for patches that are a token of their own."""

PRUNED_COLOUR = np.array([0.0, 0.0, 0.0])
STROKE = np.array([0.36, 0.37, 0.40])  # the hatching on pruned patches, which tells them from black ones
MERGED_COLOUR = "#e3d9c6"  # in the plot and in the key
CELL = 24  # pixels per patch
OUTLINE = 2  # pixels, of merged tokens

Paint = Literal["mean", "hue"]
"""How merged tokens are shown: in the mean colour of their pixels, or in a hue of their own over the image."""


def visualize(
    model: nn.Module,
    images: Tensor,
    schedule: Schedule,
    *,
    others: Sequence[Schedule] = (),
    blocks: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    paint: Paint = "mean",
    any_model: bool = False,
) -> Figure:
    """Draw what happens to the tokens of some images under a schedule.

    One row for each image: the image, then the image after several blocks, as in the paper (figure 6). Patches that
    look as in the image are tokens of their own; outlined patches of one flat colour were merged into one token; black
    hatched patches are pruned. Beside them, over all blocks: the number of tokens under each schedule, and how many of
    the patches of these images are tokens of their own, merged, or pruned.

    Args:
        model: a model that :func:`diffrate_ext.compress` supports. It is left as it is.
        images: (B, C, H, W), normalised as the model expects them.
        schedule: the schedule to draw.
        others: further schedules, for the plot only.
        blocks: after which blocks to draw, counted from 1 (of a hierarchical model: the attention blocks of the first
            stage that has them). Default: four, evenly spread, without the last, where little is left to see.
        titles: one text for each image.
        paint: "mean": a merged token has the mean colour of its pixels, so that the image stays recognisable. "hue": it
            is tinted in a hue of its own, which it keeps through the blocks, so that its parts can be found.
        any_model: draw a schedule although it says that it was made for another model.

    Returns:
        a matplotlib figure (``figure.savefig(path)`` writes it), made without pyplot: nothing global changes.

    Raises:
        InputValueError: no images, images of another size than the model's, blocks that the model does not have,
            another number of titles than of images, or a schedule for another model.
        InputTypeError, InputValueError: as :func:`diffrate_ext.compress`, for a model or schedule that does not fit.
    """
    from matplotlib.figure import Figure

    if images.ndim != 4 or len(images) == 0:
        raise InputValueError(f"images must have shape (B, C, H, W) with B >= 1, got {tuple(images.shape)}")
    if titles is not None and len(titles) != len(images):
        raise InputValueError(f"got {len(titles)} titles for {len(images)} images")
    if paint not in get_args(Paint):
        raise InputValueError(f"paint must be one of {', '.join(get_args(Paint))}, got {paint!r}")
    if not any_model:
        check_made_for(model, schedule)
    slots = [block.cpu() for block in token_slots(compressed_copy(model, schedule), images)]
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

    pictures = displayable(model, images)

    rows, columns = len(images), 1 + len(blocks)
    side = 2.2 if rows <= 2 else 1.72  # inches, of one image
    figure = Figure(
        figsize=(side * columns + 5.2, max(side * rows + 1.4, 6.0)), layout="constrained", facecolor="white"
    )
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(side * columns, 5.2))[0]
    axes = left.subplots(rows, columns, squeeze=False)
    # (images, blocks, patches)
    ids = np.stack([group_ids(torch.stack([s[row, prefix:] for s in slots[:depth]]).numpy()) for row in range(rows)])
    for row, picture in enumerate(pictures):
        whole = enlarge(picture, stage.grid)
        _show(axes[row, 0], whole)
        for column, block in enumerate(blocks, start=1):
            _show(axes[row, column], paint_tokens(whole, ids[row, block - 1].reshape(stage.grid), paint))
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], fontsize=9, color=INK)
    axes[0, 0].set_title(f"input\n{n_tokens} tokens", fontsize=10, color=INK)
    for column, block in enumerate(blocks, start=1):
        kept = n_kept(slots[block - 1][0])
        axes[0, column].set_title(f"after block {block}\n{kept} tokens", fontsize=10, color=INK)
    _draw_key(left, paint)
    upper, lower = right.subplots(2, 1, height_ratios=(1.25, 1))
    _plot_counts(upper, right, model, [schedule, *(s for s in others if s is not schedule)])
    _plot_fates(lower, ids)
    return figure


def n_kept(slots: Tensor) -> int:
    """Number of tokens that slots (N,) stand for."""
    return len(slots[slots >= 0].unique())


def group_ids(slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which patches to paint alike, after each block.

    Args:
        slots: (blocks, n) slot of each patch after each block: equal slots were merged, -1 is pruned.

    Returns:
        (blocks, n): PRUNED, SINGLE, or the number (from 1) of the group of patches that are one token. A group keeps
        its number as it grows; when groups merge, the number of the largest (of equal ones the lowest) stays.
    """
    ids = np.full(slots.shape, SINGLE, dtype=np.int64)
    ids[slots < 0] = PRUNED
    numbers = 0
    before = np.full(slots.shape[1], SINGLE, dtype=np.int64)
    for after, here in zip(slots, ids, strict=True):
        alive, counts = np.unique(after[after >= 0], return_counts=True)
        for slot in alive[counts > 1]:
            members = after == slot
            earlier, sizes = np.unique(before[members & (before > SINGLE)], return_counts=True)
            if len(earlier):
                here[members] = earlier[sizes.argmax()]
            else:
                numbers += 1
                here[members] = numbers
        before = here
    return ids


def group_colour(number: int) -> tuple[float, float, float]:
    """RGB of a group: hues a golden angle apart, so that groups numbered close together look different."""
    hue = (0.08 + number * 0.618033988749895) % 1
    return colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[number % 3], (1.0, 0.95, 0.8)[number % 3])


def paint_tokens(picture: NDArray[np.float64], ids: NDArray[np.int64], paint: Paint = "mean") -> NDArray[np.float64]:
    """Paint groups and pruned patches over a picture.

    Args:
        picture: (rows * CELL, columns * CELL, 3) in [0, 1].
        ids: (rows, columns) as :func:`group_ids` numbers them.
        paint: as for :func:`visualize`.

    Returns:
        the painted picture: pruned patches black and hatched, groups in their colour and outlined where they border on
        anything else, single tokens untouched.
    """
    painted = picture.copy()
    of_pixel = ids.repeat(CELL, 0).repeat(CELL, 1)
    y, x = np.indices(of_pixel.shape)

    pruned = of_pixel == PRUNED
    painted[pruned] = PRUNED_COLOUR
    painted[pruned & ((x + y) % (CELL // 2) < 1)] = STROKE

    outline = (of_pixel > SINGLE) & _near_border(ids)
    for number in np.unique(ids[ids > SINGLE]):
        token = of_pixel == number
        if paint == "hue":
            colour = np.array(group_colour(number))
            painted[token] = 0.4 * painted[token] + 0.6 * colour
            line = colour
        else:
            colour = painted[token].mean(0)
            painted[token] = colour
            line = colour + (0.35 if colour.mean() < 0.55 else -0.35)  # to be seen on dark tokens and on bright ones
        painted[token & outline] = line.clip(0, 1)
    return painted


def _near_border(ids: NDArray[np.int64], width: int = OUTLINE) -> NDArray[np.bool_]:
    """Pixels within ``width`` of a patch with another id, or of the edge of the picture."""
    padded = np.pad(ids, 1, constant_values=PRUNED - 1)
    rows, columns = ids.shape
    near = np.zeros((rows * CELL, columns * CELL), dtype=bool)
    strip = {-1: np.arange(CELL) < width, 0: np.ones(CELL, dtype=bool), 1: np.arange(CELL) >= CELL - width}
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            neighbour = padded[1 + down : 1 + down + rows, 1 + across : 1 + across + columns]
            near |= np.kron(neighbour != ids, np.outer(strip[down], strip[across])).astype(bool)
    return near


def displayable(model: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """Normalised images (B, C, H, W) as RGB (B, H, W, 3) in [0, 1]."""
    config = data_config(model)
    mean, std = (torch.tensor(config[name], dtype=torch.float64).reshape(-1, 1, 1) for name in ("mean", "std"))
    pixels = (images.detach().cpu().double() * std + mean).clamp(0, 1)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).numpy()


def enlarge(picture: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Resize to CELL pixels per patch; small pictures keep their square pixels."""
    height, width = grid[0] * CELL, grid[1] * CELL
    small = picture.shape[0] * 2 <= height
    resized = Image.fromarray((picture * 255).round().astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )
    return np.asarray(resized, dtype=np.float64) / 255


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
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_key(figure: Any, paint: Paint) -> None:
    from matplotlib.patches import Patch

    merged = {
        "mean": Patch(facecolor=MERGED_COLOUR, edgecolor=INK, label="merged into one token: its mean colour, outlined"),
        "hue": Patch(facecolor=(*group_colour(1), 0.6), edgecolor=group_colour(1), label="merged: one hue, one token"),
    }
    figure.legend(
        handles=[
            merged[paint],
            Patch(facecolor=tuple(PRUNED_COLOUR), edgecolor=tuple(STROKE), linewidth=0, hatch="/////", label="pruned"),
        ],
        title="as in the image: a token of its own",
        title_fontsize=9.5,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )


def _plot_counts(axes: Axes, figure: Any, model: nn.Module, schedules: Sequence[Schedule]) -> None:
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
    for number, schedule in enumerate(sorted(schedules, key=lambda s: -flops(model, s))):
        kept = [entering, *(merged for numbers in adapter.kept_numbers(schedule) for _, merged in numbers)]
        cost = flops(model, schedule)
        shown = schedule is schedules[0]
        axes.plot(
            kept,
            color=CURVES[number % len(CURVES)],
            marker="o",
            markersize=3.6,
            linewidth=2.6 if shown else 1.5,
            label=f"{cost / 1e9:.3g} GFLOPs ({cost / uncompressed:.0%}){', shown' if shown else ''}",
        )
    axes.set_title("tokens after each block", fontsize=11, color=INK)
    axes.set_ylim(0, 1.06 * max(full))
    _style(axes, len(full) - 1)
    # not inside the axes: there is no corner that no schedule passes through
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=INK)


def _plot_fates(axes: Axes, ids: NDArray[np.int64]) -> None:
    patches = ids.shape[2]
    shares = np.stack([(ids == SINGLE).mean((0, 2)), (ids > SINGLE).mean((0, 2)), (ids == PRUNED).mean((0, 2))])
    shares = np.concatenate([[[1.0], [0.0], [0.0]], shares], axis=1)  # the input
    areas = axes.stackplot(
        range(shares.shape[1]),
        100 * shares,
        colors=(OWN, MERGED_COLOUR, tuple(PRUNED_COLOUR)),
        labels=("tokens of their own", "merged", "pruned"),
        edgecolor="white",
    )
    areas[2].set(hatch="///", edgecolor=tuple(STROKE), linewidth=0)
    axes.legend(loc="lower left", fontsize=9, labelcolor=INK)
    axes.set_title(f"where the {patches} patches are, % (mean of these images)", fontsize=11, color=INK)
    axes.set_xlabel("block (0: input)", fontsize=9.5, color=INK)
    axes.set_ylim(0, 100)
    _style(axes, shares.shape[1] - 1)


def _style(axes: Axes, depth: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, depth)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
