"""Stochastic depth for models that were built without it, as models for inference are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..models import adapter_for


@contextmanager
def drop_paths(model: nn.Module, rate: float) -> Iterator[None]:
    """Within a ``with`` block, blocks drop their branches in training: never the first block's, the last's at ``rate``.

    What the model was built with comes back after it. Nothing here has parameters: state_dict stays as it is.
    """
    from timm.layers import DropPath

    adapter = adapter_for(model)
    blocks = [block for stage in adapter.stages for block in stage.blocks]
    before = [{name: getattr(block, name, None) for name in adapter.drop_paths} for block in blocks]
    for depth, block in enumerate(blocks):
        share = rate * depth / max(len(blocks) - 1, 1)
        for name in adapter.drop_paths:
            setattr(block, name, DropPath(share) if share > 0 else nn.Identity())
    try:
        yield
    finally:
        for block, parts in zip(blocks, before, strict=True):
            for name, part in parts.items():
                if part is None:
                    delattr(block, name)
                else:
                    setattr(block, name, part)
