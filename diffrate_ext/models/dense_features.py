"""Features of a compressed model's blocks, back on the grid of patches: for segmentation, detection and the like."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import ops
from ..errors import InputValueError

Fill = Literal["last", "nearest", "zeros"]
"""What a pruned patch gets: the features that it had last, those of the nearest patch that is left, or zeros."""


class DenseFeatures:
    """Puts tokens back on their grid, block after block.

    Args:
        tokens: (B, N, C), as they enter the first block.
        grid: (rows, columns) of the patches; what comes before them is prefix.
        fill: what pruned patches get.
        norm: what is done to the features in the end.
        taken: the blocks, counted from 0, whose features are wanted.

    Raises:
        InputValueError: an unknown ``fill``.
    """

    def __init__(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        fill: Fill,
        norm: Callable[[Tensor], Tensor] | None,
        taken: Collection[int],
    ) -> None:
        if fill not in get_args(Fill):
            raise InputValueError(f"fill must be one of {', '.join(map(repr, get_args(Fill)))}, got {fill!r}")
        self._last = tokens if fill == "last" else None
        self._norm, self._taken, self._seen = norm, taken, 0
        self._distances = _distances(grid, tokens.device) if fill == "nearest" else None
        self.blocks: dict[int, Tensor] = {}
        """(B, N, C) after each block that is taken."""

    def add(self, tokens: Tensor, slot: Tensor) -> None:
        """A block's tokens (B, K, C), and where among them each of the N is now, -1 once pruned."""
        if self._last is not None:
            tokens = self._last = ops.restore_tokens(tokens, slot, self._last.to(tokens.dtype))
        if self._seen in self._taken:
            tokens = tokens if self._norm is None else self._norm(tokens)
            if self._last is None:
                tokens = ops.restore_tokens(tokens, self._with_neighbours(slot))
            self.blocks[self._seen] = tokens
        self._seen += 1

    def _with_neighbours(self, slot: Tensor) -> Tensor:
        """The same, but pruned patches are where the nearest one that is left is."""
        if self._distances is None:
            return slot
        prefix, patches = slot.split([slot.shape[1] - len(self._distances), len(self._distances)], 1)
        left = self._distances.masked_fill((patches < 0)[:, None], torch.inf)
        return torch.cat((prefix, patches.gather(1, left.argmin(2))), 1)


def _distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N) between the patches of a grid."""
    rows, columns = (torch.arange(length, dtype=torch.float32, device=device) for length in grid)
    places = torch.cartesian_prod(rows, columns)
    return torch.cdist(places, places)
