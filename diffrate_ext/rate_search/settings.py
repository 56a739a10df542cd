"""How to search."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from ..errors import InputValueError
from ..training.files import Fact

LR_SUM = 20.0
"""What the learning rates of all steps add up to by default: as in the paper, whatever the number of steps."""
LR_CAP = 0.15
"""The largest default learning rate: at 0.36 the embedded model's rates run off before the FLOPs pull them back."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search. But for ``start``, the defaults are the paper's (section 4), for any model and number of steps.

    Attributes:
        steps: batches to train on.
        lr: learning rate of the first step; it falls to ``min_lr`` along a cosine. None: as large as makes the learning
            rates of all steps add up to 20, as in the paper, at most LR_CAP.
        min_lr: None: a tenth of ``lr``.
        weight_decay: of AdamW, on the logits of the rates.
        flops_weight: weight of the FLOPs term in the loss.
        flops_loss: kind of the FLOPs term, as for :meth:`RateSearch.flops_loss`.
        warmup_steps: so many first steps go without the FLOPs term.
        soft_targets: learn from what the uncompressed model says about an image instead of from its label; where it has
            no classes, from its features.
        amp: compute in bfloat16 where torch's autocast does.
        cuda_graph: replay the step from a CUDA graph, to the same result: faster where the host limits the search. The
            memory of a step stays taken. For one process on one GPU, and models without hooks.
        start: where the rates start: "uniform", at the :func:`uniform_schedule` of the target, from which some 100
            steps lead to a good schedule; "zeros", with all logits 0 as in the paper, which takes thousands.
        granularity: the step between the numbers of patches that a block may keep.
        seed: of all random choices, the loader's included as far as they come from the generators of torch, numpy and
            ``random`` in this process.

    Raises:
        InputValueError: a number out of range.
    """

    steps: int = 1000
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float = 0.0
    flops_weight: float = 5.0
    flops_loss: Literal["relative", "absolute"] = "relative"
    warmup_steps: int = 0
    soft_targets: bool = False
    amp: bool = False
    cuda_graph: bool = False
    start: Literal["uniform", "zeros"] = "uniform"
    granularity: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup_steps", 0), ("granularity", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("lr", "min_lr", "weight_decay", "flops_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if self.flops_loss not in ("relative", "absolute"):
            raise InputValueError(f"flops_loss must be 'relative' or 'absolute', got {self.flops_loss!r}")
        if self.start not in ("uniform", "zeros"):
            raise InputValueError(f"start must be 'uniform' or 'zeros', got {self.start!r}")
        if self.first_lr < self.last_lr:
            raise InputValueError(f"min_lr must not be above lr, got {self.last_lr:g} and {self.first_lr:g}")

    @property
    def first_lr(self) -> float:
        # from lr to lr/10, a cosine has a mean of 0.55 lr
        return min(LR_CAP, LR_SUM / (0.55 * self.steps)) if self.lr is None else self.lr

    @property
    def last_lr(self) -> float:
        return self.first_lr / 10 if self.min_lr is None else self.min_lr

    @property
    def betas(self) -> tuple[float, float]:
        # the paper's 0.999 remembers a quarter of its steps; a short search must not remember its start to the end
        return 0.9, min(0.999, max(0.9, 1 - 3.75 / self.steps))

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.last_lr + (self.first_lr - self.last_lr) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def fingerprint(self) -> dict[str, Fact]:
        """What a search that is resumed must have in common with the one that was stopped."""
        facts = {**asdict(self), "lr": self.first_lr, "min_lr": self.last_lr}
        del facts["cuda_graph"]  # another way to the same result
        return facts
