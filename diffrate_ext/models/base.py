"""What a model family has to tell, and the part of compression that all families share."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..flops import ModelCost
from ..reference import TINY
from ..schedule import Schedule, Steps, scale_steps
from .masked import BlockRates, SearchPlan, TokenState

# (q, k, v, scale) -> the attention's output (B, H, N, D), and the importance (B, N-P) that follows from it
AttentionFunction = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]

# called with a block's tokens (B, K, C) and the position among them (B, N) of each token that entered the first block,
# -1 once pruned
Observer = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Stage:
    """Consecutive attention blocks on one grid of patches.

    Attributes:
        blocks: the blocks in order.
        grid: (rows, columns) of the patches.
        tokens: tokens that enter, prefix included.
        compressible: whether the paper compresses the block (:meth:`Schedule.uniform` and the search go by it).
        fewest: the smallest number of kept tokens that still leaves a patch to merge into.
    """

    blocks: tuple[Any, ...]
    grid: tuple[int, int]
    tokens: int
    compressible: tuple[bool, ...]
    fewest: int


class Adapter(ABC):
    """All that compression needs to know about one family of models. Adapters hold no state."""

    family: str
    importance: str = "class"
    prunes = True  # False: the family is only ever merged

    @abstractmethod
    def knows(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise ValueError when a part of the model is not supported."""

    @abstractmethod
    def prefix(self, model: nn.Module) -> int:
        """The number of class and register tokens."""

    @abstractmethod
    def stages(self, model: nn.Module) -> tuple[Stage, ...]:
        """The attention blocks, by grid, for the model's own image size."""

    @abstractmethod
    def cost(self, model: nn.Module) -> ModelCost:
        """What the model's parts cost (method of :mod:`diffrate_ext.flops`)."""

    @abstractmethod
    def attention(self, block: Any, x: Tensor, attend: AttentionFunction) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first half of a block.

        Returns:
            shortcut and branch, both (B, N, C), whose sum leaves this half, and the importance ``attend`` gave.
        """

    @abstractmethod
    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """The second half of a block, its residual included."""

    @abstractmethod
    def compressor(self, model: nn.Module) -> BlockCompressor:
        """How the model's blocks reduce tokens."""

    @abstractmethod
    def compressed_parts(self, model: nn.Module) -> list[tuple[nn.Module, type[CompressedModule]]]:
        """The modules whose forward changes, and what changes it; one for each stage, in the same order."""

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor, observe: Observer) -> None:
        """Run the blocks of the compressed model on images, observed."""

    @abstractmethod
    def check_schedule(self, model: nn.Module, schedule: Schedule) -> None:
        """Raise ValueError when the model cannot follow the schedule for a reason of its family."""

    def name(self, model: nn.Module) -> str | None:
        """timm's name of the model, where it has one."""
        config = getattr(model, "pretrained_cfg", None) or {}
        architecture, tag = config.get("architecture"), config.get("tag")
        return f"{architecture}.{tag}" if architecture and tag else architecture

    def steps(self, model: nn.Module, schedule: Schedule) -> list[Steps]:
        """What each block keeps, by stage.

        Raises:
            ValueError: the schedule does not fit the model.
        """
        stages, prefix = self.stages(model), self.prefix(model)
        blocks, tokens = sum(len(stage.blocks) for stage in stages), stages[0].tokens
        if len(schedule) != blocks:
            raise ValueError(f"the schedule has {len(schedule)} blocks, the model {blocks}")
        if schedule.prefix != prefix:
            raise ValueError(f"the schedule has {schedule.prefix} prefix tokens, the model {prefix}")
        if schedule.grid is not None and schedule.grid != stages[0].grid:
            raise ValueError(f"the schedule is for a grid of {schedule.grid} patches, the model has {stages[0].grid}")
        most = max((*schedule.merge, *(schedule.prune or ())))
        if most > tokens:
            raise ValueError(f"the schedule keeps {most} tokens in a block, the model has only {tokens}")
        self.check_schedule(model, schedule)
        steps, first = [], 0
        for stage in stages:
            end = first + len(stage.blocks)
            prune = None if schedule.prune is None else schedule.prune[first:end]
            steps.append(Schedule(prune, schedule.merge[first:end], prefix=prefix).steps(stage.tokens))
            first = end
        return steps


@dataclass(frozen=True)
class BlockCompressor:
    """One block's forward, with compression between attention and MLP (paper, section 3.1)."""

    adapter: Adapter
    prefix: int
    importance: str

    def reduce(
        self, shortcut: Tensor, branch: Tensor, importance: Tensor, k_p: int, k_m: int, size: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort, prune, merge: x (B, k_m, C), size (B, k_m), slot (B, N)."""
        return ops.prune_merge(shortcut, importance, k_p, k_m, size, prefix=self.prefix, residual=branch)

    def reduce_masked(
        self, x: Tensor, importance: Tensor, state: TokenState, rates: BlockRates
    ) -> tuple[Tensor, TokenState, Tensor]:
        """The same in the search step, where all N tokens stay: x (B, N, C), masks and sizes, and slot (B, N)."""
        mask = x.new_ones(x.shape[:2], dtype=importance.dtype) if state.mask is None else state.mask
        x, mask, size, order, dst = ops.masked_prune_merge(
            x,
            mask,
            importance,
            state.size,
            rates.prune_prob,
            rates.merge_prob,
            rates.kept_p,
            rates.kept_m,
            prefix=self.prefix,
        )
        return x, TokenState(mask, size), torch.empty_like(dst).scatter_(1, order, dst)

    def __call__(
        self, block: nn.Module, x: Tensor, size: Tensor | None, k_p: int, k_m: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens and sizes (None: all ones) after the block, and the slot (None: nothing was removed).

        A block that removes nothing needs neither importance nor order: sorting alone changes no token.
        """
        removes = k_m < x.shape[1]
        if size is None and not removes:
            return block(x), None, None

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
            importance = self.importance if removes else None
            return ops.proportional_attention(q, k, v, size, scale=scale, prefix=self.prefix, importance=importance)

        shortcut, branch, importance = self.adapter.attention(block, x, attend)
        slot = None
        if removes:
            assert importance is not None
            x, size, slot = self.reduce(shortcut, branch, importance, k_p, k_m, size)
        else:
            x = shortcut + branch
        del shortcut, branch  # the MLP is where memory peaks
        return self.adapter.mlp(block, x), size, slot


@dataclass(frozen=True)
class Plan:
    """What a compressed module does: for how many tokens at the input, which numbers each block keeps."""

    compressor: BlockCompressor
    tokens: int
    steps: Steps
    base: type[nn.Module]  # the module's class before compression

    def run(
        self, blocks: nn.Module, x: Tensor, *, checkpointing: bool = False, observe: Observer | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, C) through the blocks.

        Args:
            blocks: the blocks in order.
            x: tokens, the prefix first.
            checkpointing: recompute each block in the backward pass instead of storing its activations.
            observe: called after each block with its tokens and the composed slots.

        Returns:
            the tokens that are left, (B, K, C), and their sizes (B, K), at least TINY; None for all ones.
        """
        steps = self.steps
        if x.shape[1] != self.tokens:
            steps = scale_steps(steps, self.tokens, x.shape[1], self.compressor.prefix)
        size: Tensor | None = None
        slot = None if observe is None else torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for block, (k_p, k_m) in zip(blocks.children(), steps, strict=False):
            if checkpointing and torch.is_grad_enabled():
                x, size, moved = checkpoint(self.compressor, block, x, size, k_p, k_m, use_reentrant=False)
            else:
                x, size, moved = self.compressor(block, x, size, k_p, k_m)
            if observe is not None and slot is not None:
                slot = slot if moved is None else ops.compose_slots(slot, moved)
                observe(x, slot)
        return x, None if size is None else size.clamp_min(TINY)

    def release(self) -> None:
        """Nothing to undo beside the module's class."""


class CompressedModule:
    """Mixin of compressed modules: their own forward, beside everything the module had before.

    Compression changes the class of a module and nothing inside it, so parameters and state_dict stay as they
    are, and ``isinstance`` still holds.
    """

    _diffrate_plan: Plan | SearchPlan

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made at run time: pickle and deepcopy need to be told how
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        mixin = type(self).__mro__[1]
        return (_new_compressed, (mixin, self._diffrate_plan.base), *reduced[2:])


@functools.cache
def compressed_class(mixin: type[CompressedModule], base: type[nn.Module]) -> type[nn.Module]:
    """``base`` with the forward of ``mixin``."""
    return type(f"Compressed{base.__name__}", (mixin, base), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


def _new_compressed(mixin: type[CompressedModule], base: type[nn.Module]) -> nn.Module:
    cls = compressed_class(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def original_class(module: Any) -> type[Any]:
    """The module's class before compression."""
    return module._diffrate_plan.base if isinstance(module, CompressedModule) else type(module)


def has_forward_of(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether the module computes what one of the classes computes, rather than an override of its own."""
    return any(original_class(module).forward is cls.forward for cls in classes)


def weight_count(module: Any, layer: type[nn.Linear] | type[nn.Conv2d]) -> int:
    """Weights in a module's layers of one sort, without biases: the multiply-accumulates per token or pixel."""
    if module is None:
        return 0
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, layer))


def attention_of_packed_qkv(attn: Any, x: Tensor, attend: AttentionFunction) -> tuple[Tensor, Tensor | None]:
    """The attention of timm's modules with one qkv layer, up to (B, N, H*D) before the projection.

    Raises:
        ValueError: training with dropout on the attention map, which is never built here.
    """
    if attn.training and attn.attn_drop.p > 0:
        raise ValueError(f"attention dropout ({attn.attn_drop.p}) cannot be trained with compression: set it to 0")
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q = getattr(attn, "q_norm", _same)(q)
    k = getattr(attn, "k_norm", _same)(k)
    # under autocast, norms give float32
    out, importance = attend(q.to(v.dtype), k.to(v.dtype), v, attn.scale)
    return out.transpose(1, 2).flatten(2), importance


def _same(x: Tensor) -> Tensor:
    return x
