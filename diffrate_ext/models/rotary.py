"""Rotary positions that travel with their tokens (RoFormer, Su et al., 2021, in the forms that timm's Eva has)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor


class RotaryPositions:
    """The sines and cosines of each token that is left. A merged token has those of its destination.

    Args:
        embedding: of the patches that enter the first block, sines before cosines, (B or 1, H or 1, N-P, 2D) for all
            blocks alike, or one for each block.
        prefix: P, the tokens before the patches. They have no position.
    """

    def __init__(self, embedding: Tensor | Sequence[Tensor], prefix: int) -> None:
        self._embedding, self._prefix = embedding, prefix
        self._patch: Tensor | None = None  # (B, K-P): whose position each patch that is left has; None: its own

    def of_block(self, index: int) -> Tensor:
        """(B or 1, H or 1, K-P, 2D), of the tokens that enter a block."""
        embedding = self._embedding if isinstance(self._embedding, Tensor) else self._embedding[index]
        if self._patch is None:
            return embedding
        patch = self._patch.to(embedding.device)
        if embedding.shape[0] == 1:
            return embedding[0][:, patch].transpose(0, 1)
        return torch.take_along_dim(embedding, patch[:, None, :, None], 2)

    def follow(self, source: Tensor) -> None:
        """A block moved its tokens: which of them stands at each place now, (B, K), the prefix first."""
        patch = source[:, self._prefix :] - self._prefix
        self._patch = patch if self._patch is None else self._patch.gather(1, patch.to(self._patch.device))


def rotated(x: Tensor, positions: Tensor, halves: bool) -> Tensor:
    """Queries or keys (B, H, N, D), of which those of the patches are turned by their positions.

    Args:
        positions: (B or 1, H or 1, N-P, 2D).
        halves: the two numbers that turn together are D/2 apart, and not neighbours.
    """
    prefix, positions = x.shape[2] - positions.shape[-2], positions.to(x.device)
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], positions, half=halves)], 2)
