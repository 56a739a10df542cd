"""How to search."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from ..errors import InputValueError
from ..methods import Method, method_of
from ..training.files import Fact
from ..training.settings_checks import check_amounts, check_whole_numbers

LR_SUM = 20.0
"""What the learning rates of all steps add up to by default: as in the paper, whatever the number of steps."""
LR_CAP = 0.15
"""The largest default learning rate: at 0.36 the embedded model's rates run off before the FLOPs pull them back."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search. But for ``start``, ``flops_loss`` and ``mask_gradient``, the defaults are the paper's (section 4),
    for any model and number of steps.

    Attributes:
        steps: batches to train on.
        lr: learning rate of the first step; it falls to ``min_lr`` along a cosine. None: as large as makes the learning
            rates of all steps add up to 20, as in the paper, at most LR_CAP.
        min_lr: None: a tenth of ``lr``.
        weight_decay: of AdamW, on the logits of the rates.
        flops_loss: how the rates come to the target. "none": they start there and are held there. The loss says nothing
            of FLOPs; each step follows it along the target, from block to block, and is then shifted back as by
            :meth:`RateSearch.project`. "relative" or "absolute", the paper's: a term in the loss draws them near, as
            :meth:`RateSearch.flops_loss`; a search ends some per cent off, and is shifted once, at its end.
        flops_weight: weight of that term. None: 5, as in the paper.
        warmup_steps: so many first steps go without that term.
        mask_gradient: what a masked token is worth, as for :class:`RateSearch`: "difference", or the paper's
            "derivative", whose noise takes over where attention is sharp.
        soft_targets: learn from what the uncompressed model says about an image instead of from its label; where it has
            no classes, from its features.
        amp: compute in bfloat16 where torch's autocast does.
        cuda_graph: replay the step from a CUDA graph, to the same result: faster where the host limits the search. The
            memory of a step stays taken. For one process on one GPU, and models without hooks.
        start: where the rates start: "best", at the best of four simple schedules by the loss on the first batches; the
            same number of tokens or the same share of them goes in each block, and half of it or nothing is pruned.
            "uniform", at one of these, the :func:`uniform_schedule` of the target. "zeros", with all logits 0 as in the
            paper, which takes thousands of steps.
        granularity: the step between the numbers of patches that a block may keep.
        seed: of all random choices, the loader's included as far as they come from the generators of torch, numpy and
            ``random`` in this process.
        method: what the rates are for, as for :func:`diffrate_ext.compress`: DiffRate with any options, or ToMe.

    Raises:
        InputTypeError: ``method`` is neither a name nor a Method.
        InputValueError: a number out of range, or no such method.
    """

    steps: int = 1000
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float = 0.0
    flops_loss: Literal["none", "relative", "absolute"] = "none"
    flops_weight: float | None = None
    warmup_steps: int = 0
    mask_gradient: Literal["difference", "derivative"] = "difference"
    soft_targets: bool = False
    amp: bool = False
    cuda_graph: bool = False
    start: Literal["best", "uniform", "zeros"] = "best"
    granularity: int = 1
    seed: int = 0
    method: str | Method = "diffrate"

    def __post_init__(self) -> None:
        check_whole_numbers(self, steps=1, warmup_steps=0, granularity=1, seed=0)
        check_amounts(self, "lr", "min_lr", "weight_decay", "flops_weight")
        if self.flops_loss not in ("none", "relative", "absolute"):
            raise InputValueError(f"flops_loss must be 'none', 'relative' or 'absolute', got {self.flops_loss!r}")
        if self.flops_loss == "none" and (self.flops_weight is not None or self.warmup_steps):
            raise InputValueError(
                "flops_weight and warmup_steps are about a FLOPs term in the loss, and there is none: "
                "choose flops_loss='relative' or 'absolute'"
            )
        if self.mask_gradient not in ("difference", "derivative"):
            raise InputValueError(f"mask_gradient must be 'difference' or 'derivative', got {self.mask_gradient!r}")
        if self.start not in ("best", "uniform", "zeros"):
            raise InputValueError(f"start must be 'best', 'uniform' or 'zeros', got {self.start!r}")
        method_of(self.method)
        if self.first_lr < self.last_lr:
            raise InputValueError(f"min_lr must not be above lr, got {self.last_lr:g} and {self.first_lr:g}")

    @property
    def holds_target(self) -> bool:
        return self.flops_loss == "none"

    @property
    def first_lr(self) -> float:
        # from lr to lr/10, a cosine has a mean of 0.55 lr
        return min(LR_CAP, LR_SUM / (0.55 * self.steps)) if self.lr is None else self.lr

    @property
    def last_lr(self) -> float:
        return self.first_lr / 10 if self.min_lr is None else self.min_lr

    @property
    def weight_of_flops(self) -> float:
        return 0.0 if self.holds_target else 5.0 if self.flops_weight is None else self.flops_weight

    @property
    def betas(self) -> tuple[float, float]:
        # the paper's 0.999 remembers a quarter of its steps; a short search must not remember its start to the end
        return 0.9, min(0.999, max(0.9, 1 - 3.75 / self.steps))

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.last_lr + (self.first_lr - self.last_lr) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def fingerprint(self) -> dict[str, Fact]:
        """What a search that is resumed must have in common with the one that was stopped."""
        facts = {
            **asdict(self),
            "flops_weight": self.weight_of_flops,
            "lr": self.first_lr,
            "min_lr": self.last_lr,
            "method": str(method_of(self.method)),
        }
        del facts["cuda_graph"]  # another way to the same result
        return facts
