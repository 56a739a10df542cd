"""How to fine-tune."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import InputValueError
from ..training.files import Fact
from ..training.settings_checks import check_amounts, check_whole_numbers

LR_BATCH = 512
"""Images in a step that the learning rates are meant for."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune. But for ``steps``, the defaults are the paper's, after DeiT's recipe.

    The learning rate rises for ``warmup_steps`` and then falls along a cosine from ``lr`` to ``min_lr``. Both are meant
    for 512 images in a step. For B images, of all processes together, the rates are B / 512 times as large (DeiT's
    rule): with batches of 64 a run starts at ``2e-5 * 64 / 512 = 2.5e-6``.

    Attributes:
        steps: batches to train on.
        lr: the largest learning rate, for 512 images in a step.
        min_lr: that of the end. None: a twentieth of ``lr``, the paper's 1e-6 by default.
        warmup_steps: so many first steps rise to ``lr``. None: a twentieth of ``steps``.
        weight_decay: of AdamW; none for biases, norms, positions and class tokens.
        drop_path: share of the images for which the last block's branches are dropped (stochastic depth); it rises from
            0 in the first block. It replaces what the model was built with.
        smoothing: share of the labels' probability that is spread over all classes.
        distill: weight of what the uncompressed model says, as a soft target; 1 - distill is that of the labels. With 1
            images need no labels, and a model without classes keeps its features, by their cosine.
        clip: gradients that are longer are shortened to this; ``math.inf``: none is.
        amp: compute in bfloat16 where torch's autocast does; the weights stay float32.
        seed: of all random choices, the loader's included as far as they come from the generators of torch, numpy and
            ``random`` in this process.

    Raises:
        InputValueError: a number out of range.
    """

    steps: int = 1000
    lr: float = 2e-5
    min_lr: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    drop_path: float = 0.1
    smoothing: float = 0.1
    distill: float = 0.0
    clip: float = 1.0
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(self, steps=1, warmup_steps=0, seed=0)
        check_amounts(self, "lr", "min_lr", "weight_decay")
        for name in ("drop_path", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputValueError(f"{name} must lie in [0, 1), got {getattr(self, name)!r}")
        if not 0 <= self.distill <= 1:
            raise InputValueError(f"distill must lie in [0, 1], got {self.distill!r}")
        if not self.clip > 0:
            raise InputValueError(f"clip must be above 0, got {self.clip!r}")
        if self.last_lr > self.lr:
            raise InputValueError(f"min_lr must not be above lr, got {self.last_lr:g} and {self.lr:g}")
        if self.warmup >= self.steps:
            raise InputValueError(f"warmup_steps must be below steps = {self.steps}, got {self.warmup}")

    @property
    def warmup(self) -> int:
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    @property
    def last_lr(self) -> float:
        return self.lr / 20 if self.min_lr is None else self.min_lr

    def lr_at(self, step: int, images: float) -> float:
        """The learning rate of a step, counted from 0, for so many images in it."""
        if step < self.warmup:
            lr = self.lr * (step + 1) / (self.warmup + 1)
        else:
            done = (step - self.warmup) / (self.steps - self.warmup)
            lr = self.last_lr + (self.lr - self.last_lr) * (1 + math.cos(math.pi * done)) / 2
        return lr * images / LR_BATCH

    def fingerprint(self) -> dict[str, Fact]:
        """What a run that is resumed must have in common with the one that was stopped."""
        return {**asdict(self), "warmup_steps": self.warmup, "min_lr": self.last_lr}
