"""FLOPs (multiply-accumulates) of plain and compressed models, counted as in DeiT, ToMe and DiffRate (section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .schedule import Schedule


@dataclass(frozen=True)
class BlockCost:
    """Multiply-accumulates of one block: ``N * attention + N^2 * pairs`` before compression, ``N * mlp`` after it."""

    attention: int
    pairs: int
    mlp: int


@dataclass(frozen=True)
class StageCost:
    """Consecutive blocks that ``tokens`` tokens enter, and what comes before them (``fixed``)."""

    tokens: int
    fixed: int
    blocks: tuple[BlockCost, ...]


@dataclass(frozen=True)
class ModelCost:
    """What a model costs as a function of the tokens it keeps; ``head_per_token`` is paid by each token at the end."""

    stages: tuple[StageCost, ...]
    head: int
    head_per_token: int = 0

    def total(self, kept: Sequence[Sequence[Any]]) -> Any:
        """Multiply-accumulates for one image, given the tokens left after each block of each stage.

        Tokens are whole numbers or, in the rate search, 0-d tensors with a gradient; so is the result.
        """
        total: Any = self.head
        for stage, numbers in zip(self.stages, kept, strict=True):
            total += stage.fixed
            tokens = stage.tokens
            for block, left in zip(stage.blocks, numbers, strict=True):
                total += tokens * block.attention + tokens * tokens * block.pairs
                tokens = left
                total += tokens * block.mlp
        return total + tokens * self.head_per_token


def model_cost(model: nn.Module) -> ModelCost:
    """The parts that :func:`flops` adds up.

    Raises:
        TypeError: the model's family is not supported.
    """
    from .models import adapter_for

    return adapter_for(model).cost(model)


def flops(model: nn.Module, schedule: Schedule | None = None) -> int:
    """Multiply-accumulates of one image of the model's own input size.

    Only matrix products and convolutions count. The convention of the paper is kept where it is coarse: the patch
    embedding is counted for the prefix tokens too, and CAFormer's head as ``8 * C * classes``.

    Args:
        model: an image model of timm; on ``torch.device("meta")`` it costs no memory.
        schedule: None counts the uncompressed model, whether or not ``model`` is compressed at the moment.

    Raises:
        TypeError: the model's family is not supported.
        ValueError: the schedule does not fit the model.
    """
    from .models import adapter_for

    adapter = adapter_for(model)
    stages = adapter.stages(model)
    if schedule is None:
        kept = [[stage.tokens] * len(stage.blocks) for stage in stages]
    else:
        kept = [[merged for _, merged in steps] for steps in adapter.steps(model, schedule)]
    return adapter.cost(model).total(kept)
