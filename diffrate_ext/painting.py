"""From the slots of tokens to pixels: what was pruned, and what was merged into what, painted over an image."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PRUNED, SINGLE = -1, 0
"""Marks in :func:`group_ids` for patches that are gone, and for patches that are a token of their own."""

PRUNED_COLOUR = np.array([0.0, 0.0, 0.0])
STROKE = np.array([0.42, 0.42, 0.45])  # the hatching on pruned patches, which tells them from black ones
HIGHLIGHTS = ("#00d0ff", "#ffe600", "#ff3fd0")
"""Outlines of the largest groups: colours that photographs rarely have, of different brightness."""
CELL = 24  # pixels per patch
OUTLINE, HIGHLIGHT = 2, 4  # pixels, of a group's outline

Paint = Literal["mean", "hue"]
"""How merged tokens are shown: in the mean colour of their pixels, or in a hue of their own over the image."""

Rgb = tuple[float, float, float]


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


def largest_groups(ids: NDArray[np.int64], count: int = len(HIGHLIGHTS)) -> list[int]:
    """Numbers of the groups with the most patches after any of the blocks in ``ids`` (blocks, n), the largest first."""
    sizes: dict[int, int] = {}
    for after in ids:  # a group never shrinks: its last size is its largest
        numbers, counts = np.unique(after[after > SINGLE], return_counts=True)
        sizes |= dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return sorted(sizes, key=lambda number: (-sizes[number], number))[:count]


def group_colour(number: int) -> Rgb:
    """RGB of a group: hues a golden angle apart, so that groups numbered close together look different."""
    hue = (0.08 + number * 0.618033988749895) % 1
    return colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[number % 3], (1.0, 0.95, 0.8)[number % 3])


def paint_tokens(
    picture: NDArray[np.float64],
    ids: NDArray[np.int64],
    paint: Paint = "mean",
    highlighted: Sequence[int] = (),
) -> NDArray[np.float64]:
    """Paint groups and pruned patches over a picture.

    Args:
        picture: (rows * CELL, columns * CELL, 3) in [0, 1].
        ids: (rows, columns) as :func:`group_ids` numbers them.
        paint: as for :func:`diffrate_ext.visualize`.
        highlighted: numbers of groups to outline in HIGHLIGHTS, in their order. Not with hues, which tell groups apart.

    Returns:
        the painted picture: pruned patches black and hatched, groups in their colour and outlined where they border on
        anything else, single tokens untouched.
    """
    painted = picture.copy()
    of_pixel = ids.repeat(CELL, 0).repeat(CELL, 1)
    y, x = np.indices(of_pixel.shape)

    pruned = of_pixel == PRUNED
    painted[pruned] = PRUNED_COLOUR
    painted[pruned & ((x + y) % CELL < 2)] = STROKE

    outline = near_border(ids, OUTLINE)
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
    if paint == "mean" and len(highlighted):
        _highlight(painted, ids, of_pixel, dict(zip(highlighted, map(_rgb, HIGHLIGHTS), strict=False)))
    return painted


def _highlight(
    painted: NDArray[np.float64], ids: NDArray[np.int64], of_pixel: NDArray[np.int64], colours: Mapping[int, Rgb]
) -> None:
    wide, rim = near_border(ids, HIGHLIGHT), near_border(ids, HIGHLIGHT + 1)
    for number, colour in colours.items():
        painted[(of_pixel == number) & rim] = 0  # a dark rim, so that the line shows on bright tokens
        painted[(of_pixel == number) & wide] = colour


def near_border(ids: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
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


def enlarge(picture: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Resize to CELL pixels per patch; small pictures keep their square pixels."""
    height, width = grid[0] * CELL, grid[1] * CELL
    small = picture.shape[0] * 2 <= height
    resized = Image.fromarray((picture * 255).round().astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )
    return np.asarray(resized, dtype=np.float64) / 255


def _rgb(colour: str) -> Rgb:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue
