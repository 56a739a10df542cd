"""Patch embedding as a matrix product.

A convolution whose stride equals its kernel cuts the image into tiles and multiplies each with one matrix. Libraries of
convolutions miss this: cuDNN takes ten times as long, and changes the memory layout twice.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .classes import CompressedModule, original_class


class TiledConvolution(CompressedModule, nn.Conv2d):
    """A Conv2d of which :func:`is_tiled` is true, as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            return super().forward(x)  # whose error says what is wrong
        rows, columns = self.kernel_size
        # as a convolution does it: what does not fill a tile is left out
        tiles_down, tiles_across = x.shape[-2] // rows, x.shape[-1] // columns
        x = x[..., : tiles_down * rows, : tiles_across * columns]
        tiles = x.unflatten(-1, (tiles_across, columns)).unflatten(-3, (tiles_down, rows))
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, down, across, channels * rows * columns)
        # channels last in memory, so that timm's flatten and transpose to (B, N, C) copy nothing
        return F.linear(tiles, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def is_tiled(module: Any) -> bool:
    """Whether a module is a plain Conv2d whose kernels touch each pixel once."""
    return (
        original_class(module) is nn.Conv2d
        and tuple(module.stride) == tuple(module.kernel_size)
        and tuple(module.dilation) == (1, 1)
        and module.padding in (0, (0, 0), "valid")
        and module.groups == 1
    )
