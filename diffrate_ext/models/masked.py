"""The search step's way through the blocks: nothing is dropped, tokens are masked (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops

if TYPE_CHECKING:
    from .base import BlockCompressor, Observer, Plan


@dataclass(frozen=True)
class BlockRates:
    """What one block keeps now, differentiable: numbers (0-d) and keep probabilities of the sorted positions (N)."""

    prune_prob: Tensor
    merge_prob: Tensor
    kept_p: Tensor
    kept_m: Tensor


@dataclass(frozen=True)
class TokenState:
    """What belongs to the tokens beside their features; None: all ones, as before the first compression."""

    mask: Tensor | None = None
    size: Tensor | None = None


class Rates(Protocol):
    """What :class:`SearchPlan` asks of the rate search."""

    def block_rates(self, stage: int) -> Sequence[BlockRates | None]:
        """The rates of each block of a stage, None for blocks that are never compressed."""

    def plan(self, stage: int) -> Plan:
        """The compression that the rates stand for now."""

    def release(self) -> None:
        """Undo what the search changed in the model, beside its class."""


class SearchPlan:
    """What a module does during the search: masks in training mode, compression at the current rates otherwise."""

    def __init__(self, compressor: BlockCompressor, stage: int, tokens: int, base: type[nn.Module], rates: Rates):
        self.compressor = compressor
        self.stage = stage
        self.tokens = tokens
        self.base = base  # the module's class before the search
        self.rates = rates

    def release(self) -> None:
        self.rates.release()

    def run(
        self, blocks: nn.Module, x: Tensor, *, checkpointing: bool = False, observe: Observer | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Plan.run`. In training mode all N tokens stay, and masked ones have size 0."""
        if not blocks.training:
            return self.rates.plan(self.stage).run(blocks, x, checkpointing=checkpointing, observe=observe)
        if x.shape[1] != self.tokens:
            raise ValueError(
                f"the search needs images of the model's own size and no patch dropout: {self.tokens} tokens, got "
                f"{x.shape[1]}"
            )
        state = TokenState()
        slot = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for block, rates in zip(blocks.children(), self.rates.block_rates(self.stage), strict=True):
            if checkpointing and torch.is_grad_enabled():
                x, state, moved = checkpoint(
                    _masked_block, self.compressor, block, x, state, rates, use_reentrant=False
                )
            else:
                x, state, moved = _masked_block(self.compressor, block, x, state, rates)
            if observe is not None:
                slot = slot if moved is None else ops.compose_slots(slot, moved)
                observe(x, slot)
        return x, None if state.mask is None or state.size is None else state.size * state.mask


def _masked_block(
    compressor: BlockCompressor, block: nn.Module, x: Tensor, state: TokenState, rates: BlockRates | None
) -> tuple[Tensor, TokenState, Tensor | None]:
    """Tokens and their state after the block, and where each token went (None: none moved)."""
    if rates is None and state.mask is None:
        return block(x), state, None

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        arguments: dict[str, Any] = {"scale": scale, "prefix": compressor.prefix, "importance": compressor.importance}
        if state.mask is None:  # nothing is masked yet: fused attention computes the same
            return ops.proportional_attention(q, k, v, state.size, **arguments)
        return ops.masked_attention(q, k, v, state.mask, state.size, **arguments)

    shortcut, branch, importance = compressor.adapter.attention(block, x, attend)
    x, moved = shortcut + branch, None
    if rates is not None:
        assert importance is not None
        x, state, moved = compressor.reduce_masked(x, importance, state, rates)
    return compressor.adapter.mlp(block, x), state, moved
