"""DynamicViT: in a few blocks a small network that was trained for the model says which patches stay (Rao et al.,
"DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021, section 3).

The paper drops tokens where a block begins. Here, as with the other methods, it is between a block's attention and its
MLP, so the predictors see the tokens after the attention's residual, and a schedule's numbers say what is left after
each block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..errors import InputTypeError, InputValueError
from ..models.adapter import Adapter, Stage, TokenRules
from ..models.compressed import NewStep, Step, TokenState
from ..schedule import KeptNumbers
from .diffrate import DropTokens
from .method import Method, shares_kept
from .predictors import Predictor, Predictors


class DropByScore(DropTokens):
    """One block's patches pruned by what a predictor says of them; without one, none is."""

    def __init__(self, rules: TokenRules, k_m: int, predictor: Predictor | None, before: TokenState) -> None:
        super().__init__(rules, k_m, k_m, before)
        self.predictor = predictor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # every token counts for one; the scores come later, of what attention makes of the tokens
        out, self.importance = ops.proportional_attention(
            q, k, v, None, scale=scale, prefix=self.rules.prefix, importance_from=None
        )
        return out

    def _reduce(self, x: Tensor, branch: Tensor, norm: ops.Norm | None) -> tuple[Tensor, Tensor | None]:
        if self.k_m < x.shape[1]:
            assert self.predictor is not None  # DynamicViT.check saw to it
            self.importance = self.predictor.scores(x, branch, self.rules.prefix)
        return super()._reduce(x, branch, norm)


@dataclass(frozen=True)
class DynamicViT(Method):
    """Pruning only, by predictors that :func:`diffrate_ext.train_predictors` trains.

    The FLOPs of a schedule leave out the predictors: each costs about a tenth of a block on the tokens that come to it,
    some 2 % of a model of 12 blocks in all.

    Raises:
        FileNotFoundError, InputValueError: a file that is not there, or holds no predictors.
    """

    predictors: Predictors | str | os.PathLike[str] | None = None
    """Or the file that they were saved in. Without them no model can be compressed."""

    name: ClassVar[str] = "dynamicvit"
    needs_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.predictors, (str, os.PathLike)):
            object.__setattr__(self, "predictors", Predictors.load(self.predictors))
        if self.predictors is not None and not isinstance(self.predictors, Predictors):
            raise InputTypeError(f"predictors must be Predictors or a file, got {type(self.predictors).__name__}")

    def __str__(self) -> str:
        file = None if self.predictors is None else self._predictors.file
        return self.name if file is None else f"{self.name}:predictors={file}"

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:
        if not adapter.prunes:
            raise InputValueError(f"a {adapter.family} is only merged, and DynamicViT prunes")
        predictors = self._predictors
        predictors.check(adapter)
        for stage, kept in zip(adapter.stages, numbers, strict=True):
            for block in pruning_blocks(stage.tokens, kept):
                if predictors.get(block) is None:
                    has = ", ".join(map(str, predictors.blocks))
                    raise InputValueError(
                        f"the schedule removes tokens in block {block}, and the predictors are for {has}: train some "
                        "for this schedule"
                    )

    def step(
        self, rules: TokenRules, k_p: int, k_m: int, before: TokenState, predictor: Predictor | None = None
    ) -> Step:
        return DropByScore(rules, k_m, predictor, before)

    def steps(self, rules: TokenRules, numbers: KeptNumbers) -> Sequence[NewStep]:
        of_block = self._predictors.get
        return [
            partial(self.step, rules, k_p, k_m, predictor=of_block(block)) for block, (k_p, k_m) in enumerate(numbers)
        ]

    def uniform(self, stage: Stage, strength: float) -> list[int]:
        """In each block that has a predictor, usually 3, 6 and 9 of 12, the same share of the patches stays."""
        return shares_kept(stage, strength, self._predictors.blocks)

    @property
    def _predictors(self) -> Predictors:
        if not isinstance(self.predictors, Predictors):
            raise InputValueError(
                "DynamicViT needs predictors that were trained for the model: train_predictors(model, images, gflops) "
                "first, then DynamicViT(predictors), or DynamicViT(FILE) if they were saved"
            )
        return self.predictors


def pruning_blocks(tokens: int, kept: KeptNumbers) -> list[int]:
    """The blocks that remove any of so many tokens."""
    after = [k_m for _, k_m in kept]
    return [block for block, before in enumerate([tokens, *after[:-1]]) if after[block] < before]
