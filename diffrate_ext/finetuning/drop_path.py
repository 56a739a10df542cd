"""Stochastic depth for models that were built without it, as models for inference are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import InputValueError


@contextmanager
def drop_paths(model: nn.Module, rate: float) -> Iterator[None]:
    """Within a ``with`` block, blocks drop their branches in training: never the first block's, the last's at ``rate``.

    What the model was built with comes back after it. Nothing here has parameters: state_dict stays as it is.

    Raises:
        InputValueError: the blocks have no place for it.
    """
    from timm.layers import DropPath

    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "drop_path1")]
    if rate > 0 and not blocks:
        raise InputValueError(
            f"drop path cannot be set on {type(model).__name__}, whose blocks have none: fine-tune with drop_path=0"
        )
    before = [(block, block.drop_path1, block.drop_path2) for block in blocks]
    for depth, block in enumerate(blocks):
        share = rate * depth / max(len(blocks) - 1, 1)
        block.drop_path1, block.drop_path2 = (DropPath(share) if share > 0 else nn.Identity() for _ in range(2))
    try:
        yield
    finally:
        for block, first, second in before:
            block.drop_path1, block.drop_path2 = first, second
