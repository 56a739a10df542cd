"""How a compressed model runs: one loop over its blocks, each of which calls a :class:`Step`.

A model's :class:`Plan` makes the steps of one forward pass, one for each block; the block computes attention
and reduces its tokens through its step. Steps are in ``methods``: those that drop tokens, and those
of the rate search, which mask them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import InputTypeError, InputValueError
from ..numeric import TINY
from .norm_ahead import NormAhead
from .rotary import RotaryPositions, rotated

Observer = Callable[[Tensor, Tensor], None]
"""Called with a block's tokens (B, K, C) and the position among them (B, N) of each token that entered the first block,
-1 once pruned."""


class TokenState(NamedTuple):
    """What belongs to the tokens beside their features."""

    size: Tensor | None = None
    """Token sizes (B, N); None: ones."""
    mask: Tensor | None = None
    """In the rate search (B, N), 1 for tokens that are there and 0 for the others; None: all are there."""

    @property
    def weights(self) -> Tensor | None:
        """What the tokens count for where they are pooled (B, N), never 0 but for masked ones; None: alike."""
        if self.size is None:
            return None
        return self.size.clamp_min(TINY) if self.mask is None else self.size * self.mask

    def on(self, device: torch.device) -> TokenState:
        """The same on the tokens' device, where a model is spread over several."""
        if self.size is None or self.size.device == device:
            return self
        return TokenState(self.size.to(device), None if self.mask is None else self.mask.to(device))


class Step(ABC):
    """What one block does with its tokens in one forward pass.

    The block calls ``norm`` where it begins with one, ``attend``, ``reduce`` (or ``reduce_and_norm``), and ``add``.
    """

    entry: NormAhead | None = None
    """Between the block before and this one."""
    exit: NormAhead | None = None
    """Between this block and the next."""
    positions: Tensor | None = None
    """Rotary positions of the patches (B or 1, H or 1, N-P, 2D) that come; None: the model has no such."""
    after: TokenState
    """Set by ``reduce``."""
    slot: Tensor | None
    """Set by ``reduce``: where each of the block's tokens (B, N) is now; -1: nowhere; None: none moved."""
    source: Tensor | None = None
    """Set by ``reduce`` where there are positions: which of the block's tokens stands at each place now, (B, K), a
    merged one where its destination does; None: none moved."""

    def norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        """The tokens (B, N, C) as they came, by the block's first norm."""
        return norm(x) if self.entry is None else self.entry.take(x)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention (B, H, N, D), for q, k, v of that shape."""

    @abstractmethod
    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add the attention branch to the tokens, both (B, N, C), and reduce them to (B, K, C)."""

    def reduce_and_norm(self, x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The same, and what the block's next module makes of the tokens that are left."""
        x = self.reduce(x, branch)
        return x, norm(x)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The MLP branch added to the tokens, both (B, K, C): what the block returns."""
        return x + branch if self.exit is None else self.exit.add(x, branch)


NewStep = Callable[[TokenState], Step]
"""Makes a block's step for the state that its tokens come in."""


class Plan(ABC):
    """What a compressed model, or stage of one, does with its tokens."""

    masks_in_training: ClassVar[bool] = False
    """Whether in training mode tokens are masked instead of dropped."""

    @abstractmethod
    def steps(self, tokens: int, training: bool) -> Sequence[NewStep]:
        """For each block, what it does in a forward pass of ``tokens`` tokens, prefix included."""

    @property
    def fewest_left(self) -> int | None:
        """Tokens that the block with the fewest leaves, prefix included; None: there is a patch in any case."""
        return None

    def release(self) -> None:  # noqa: B027  most have nothing to undo
        """Called when the plan is replaced or removed: undo what it changed beside the model's classes."""


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    steps: Sequence[NewStep],
    *,
    rotary: RotaryPositions | None = None,
    checkpointing: bool = False,
    observe: Observer | None = None,
) -> tuple[Tensor, TokenState]:
    """Tokens (B, N, C) through the blocks.

    Args:
        blocks: compressed blocks in order; of a model that was cut short, fewer than there are steps.
        x: tokens, the prefix first.
        steps: of a :class:`Plan`.
        rotary: positions of the tokens, where the model's attention takes such.
        checkpointing: recompute each block in the backward pass instead of storing its activations.
        observe: called after each block.

    Returns:
        the tokens that are left, (B, K, C), and their state.

    Raises:
        InputValueError: there are more blocks than steps.
    """
    if len(blocks) > len(steps):
        raise InputValueError(f"the model has {len(blocks)} blocks, and was compressed with {len(steps)}: do it again")
    state = TokenState()
    slot = None if observe is None else torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    entry: NormAhead | None = None
    for index, (block, following, new_step) in enumerate(zip_longest(blocks, blocks[1:], steps[: len(blocks)])):
        positions = None if rotary is None else rotary.of_block(index)
        if checkpointing and torch.is_grad_enabled():
            exit = None
            left = checkpoint(_run_block, block, x, new_step, state, positions, use_reentrant=False)
        else:
            exit = None if following is None else NormAhead.between(block, following)
            left = _run_block(block, x, new_step, state, positions, entry, exit)
        x, state, moved, source = left
        entry = exit
        if rotary is not None and source is not None:
            rotary.follow(source)
        if observe is not None and slot is not None:
            slot = slot if moved is None else ops.compose_slots(slot, moved)
            observe(x, slot)
    return x, state


def _run_block(
    block: nn.Module,
    x: Tensor,
    new_step: NewStep,
    state: TokenState,
    positions: Tensor | None,
    entry: NormAhead | None = None,
    exit: NormAhead | None = None,
) -> tuple[Tensor, TokenState, Tensor | None, Tensor | None]:
    step = new_step(state)
    step.positions, step.entry, step.exit = positions, entry, exit
    x = block(x, step)
    return x, step.after, step.slot, step.source


def packed_attention(attn: Any, x: Tensor, step: Step | None) -> Tensor:
    """What timm's attention modules with one qkv layer do before their projection: (B, N, C) to (B, N, H*D).

    Raises:
        InputTypeError, InputValueError: as :func:`attention`.
    """
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attention(attn, q, k, v, step)


def attention(attn: Any, q: Tensor, k: Tensor, v: Tensor, step: Step | None) -> Tensor:
    """The same from its queries, keys and values (B, H, N, D), before their norms and rotary positions.

    Raises:
        InputTypeError: there is no step: the module was not called by a compressed model.
        InputValueError: training with dropout on the attention map, which is never built here.
    """
    q = getattr(attn, "q_norm", _same)(q)
    k = getattr(attn, "k_norm", _same)(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    return attended(q, k, v, step, scale=attn.scale, dropout=dropout, halves=getattr(attn, "rotate_half", False))


def attended(
    q: Tensor, k: Tensor, v: Tensor, step: Step | None, *, scale: float, dropout: float, halves: bool
) -> Tensor:
    """The same from normed queries and keys, whatever module they are of.

    Args:
        dropout: on the attention map, as it is to be now: 0 in evaluation mode.
        halves: as for :func:`rotated`, where the step has positions.

    Raises:
        InputTypeError, InputValueError: as :func:`attention`.
    """
    if step is None:
        raise InputTypeError(NO_STEP)
    if dropout > 0:
        raise InputValueError(f"attention dropout ({dropout}) cannot be trained with compression: set it to 0")
    if step.positions is not None:
        q, k = (rotated(x, step.positions, halves) for x in (q, k))
    # under autocast, norms give float32
    out = step.attend(q.to(v.dtype), k.to(v.dtype), v, scale)
    return out.transpose(1, 2).flatten(2)


NO_STEP = (
    "a compressed model's blocks are called by the model, which tells each how many tokens to keep: call the model or "
    "its forward_features, not model.blocks; or restore() it first"
)


def _same(x: Tensor) -> Tensor:
    return x
