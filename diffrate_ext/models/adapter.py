"""What a model family has to tell about one of its models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..costs import ModelCost
from ..errors import InputValueError
from ..schedule import KeptNumbers, Schedule
from .classes import CompressedModule
from .compressed import Observer


@dataclass(frozen=True)
class TokenRules:
    """How a family's tokens are told apart, matched and merged."""

    prefix: int
    """Class and register tokens: they come first, and are never pruned, merged or merged into."""
    importance_from: Literal["class", "received"]
    """Attention of the class token, or attention received: the mean over queries."""
    size_rule: Literal["cosine", "sum"] = "cosine"
    """What a merged token adds to its destination's size: its own size times the cosine, or its own size."""
    spares_most_important: bool = False
    """The most important patch takes no other in (CAFormer: the authors' code treats it like a class token, and the
    published results stand on that)."""


@dataclass(frozen=True)
class Stage:
    """Consecutive attention blocks on one grid of patches."""

    host: nn.Module
    """The module that runs the blocks: the model, or a stage of it. Its forward asks ``self._diffrate_plan.steps(...)``
    for the steps, passes them to ``run_blocks``, and takes account of the sizes and the mask that come back."""
    blocks: tuple[Any, ...]
    """In order, without wrappers."""
    grid: tuple[int, int]
    """(rows, columns) of the patches, for the model's own image size."""
    tokens: int
    """Tokens that enter, prefix included."""
    compressible: tuple[bool, ...]
    """For each block, whether the paper compresses it (uniform schedules and the search go by it). True in one stage
    only: the search has one set of rates."""
    fewest: int
    """The smallest number of kept tokens that still leaves a patch to merge into."""

    @property
    def prefix(self) -> int:
        return self.tokens - self.grid[0] * self.grid[1]

    @property
    def all_tokens(self) -> KeptNumbers:
        """The kept numbers of blocks that remove nothing."""
        return ((self.tokens, self.tokens),) * len(self.blocks)


class Adapter(ABC):
    """One model, as compression sees it.

    Raises:
        InputValueError: a part of the model is not supported.
    """

    family: ClassVar[str]
    prunes: ClassVar[bool] = True
    """False: the family is only ever merged."""
    drop_paths: ClassVar[tuple[str, ...]] = ("drop_path1", "drop_path2")
    """Where its blocks drop their branches, by name."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._check()

    @abstractmethod
    def _check(self) -> None:
        """Raise InputValueError when a part of the model is not supported."""

    @classmethod
    @abstractmethod
    def knows(cls, model: nn.Module) -> bool:
        """Whether a model is of this family."""

    @property
    @abstractmethod
    def rules(self) -> TokenRules:
        """How the model's tokens are reduced."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The attention blocks, by grid, for the model's own image size."""

    @property
    @abstractmethod
    def cost(self) -> ModelCost:
        """What the model's parts cost."""

    @property
    @abstractmethod
    def replacements(self) -> list[tuple[nn.Module, type[CompressedModule]]]:
        """The modules whose forward changes, and what changes it: hosts, blocks and their attention."""

    @property
    def patch_convolutions(self) -> list[nn.Module]:
        """Convolutions of the patch embedding that a matrix product can stand for (``patch_embedding.is_tiled``)."""
        return []

    @abstractmethod
    def check_schedule(self, schedule: Schedule) -> None:
        """Raise InputValueError when the model cannot follow the schedule for a reason of its family."""

    @abstractmethod
    def observe(self, images: Tensor, observe: Observer) -> None:
        """Run the compressed model on images, observed after each block."""

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of another size (height, width).

        Raises:
            InputValueError: the family takes no such images, or has several grids.
        """
        raise InputValueError(f"of a {self.family} only images of its own size are known")

    @property
    def head(self) -> nn.Module | None:
        """What takes the pooled features of an image; None: the model's answer is those."""
        head = self.model.get_classifier()
        return head[0] if isinstance(head, tuple) else head  # a distilled model has two

    @property
    def undecayed(self) -> set[str]:
        """Parameters of several dimensions that weight decay spares: tokens and position embeddings."""
        return set(self.model.no_weight_decay()) if hasattr(self.model, "no_weight_decay") else set()

    @property
    def name(self) -> str | None:
        """timm's name of the model, where it has one."""
        config: dict[str, Any] = getattr(self.model, "pretrained_cfg", None) or {}
        architecture, tag = config.get("architecture"), config.get("tag")
        return f"{architecture}.{tag}" if architecture and tag else architecture

    def kept_numbers(self, schedule: Schedule) -> list[KeptNumbers]:
        """What each block keeps under a schedule, by stage.

        Raises:
            InputValueError: the schedule does not fit the model.
        """
        stages, prefix = self.stages, self.rules.prefix
        depths, grid, tokens = [len(stage.blocks) for stage in stages], stages[0].grid, stages[0].tokens
        if len(schedule) != sum(depths):
            raise InputValueError(f"the schedule has {len(schedule)} blocks, the model {sum(depths)}")
        if schedule.stages is not None and list(schedule.stages) != depths:
            raise InputValueError(
                f"the schedule is for stages of {list(schedule.stages)} blocks, the model has {depths}"
            )
        if schedule.prefix != prefix:
            raise InputValueError(f"the schedule has {schedule.prefix} prefix tokens, the model {prefix}")
        if schedule.grid is not None and schedule.grid != grid:
            raise InputValueError(f"the schedule is for a grid of {schedule.grid} patches, the model has {grid}")
        most = max((*schedule.after_merging, *(schedule.after_pruning or ())))
        if most > tokens:
            raise InputValueError(f"the schedule keeps {most} tokens in a block, the model has only {tokens}")
        self.check_schedule(schedule)
        numbers, first = [], 0
        for stage, depth in zip(stages, depths, strict=True):
            blocks = slice(first, first + depth)
            pruned = None if schedule.after_pruning is None else schedule.after_pruning[blocks]
            numbers.append(Schedule(pruned, schedule.after_merging[blocks], prefix).kept_numbers(stage.tokens))
            first += depth
        return numbers


def linear_weights(module: nn.Module | None) -> int:
    """Weights in a module's linear layers, without biases: the multiply-accumulates per token.

    A layer's features are counted and not what its weight holds, which may be quantised and packed; nor does it have to
    be nn.Linear. A layer that is made of others (LoRA's) is those.
    """
    if module is None:
        return 0
    if inside := sum(map(linear_weights, module.children())):
        return inside
    features: Any = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return math.prod(features) if all(isinstance(number, int) for number in features) else 0


def convolution_weights(module: nn.Module) -> int:
    """Weights in a module's convolutions, without biases: the multiply-accumulates per pixel."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Conv2d))
