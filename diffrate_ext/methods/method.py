"""What a method of token compression has to tell, and the plan that carries one out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

from ..models.adapter import Adapter, Stage, TokenRules
from ..models.compressed import NewStep, Plan, Step, TokenState
from ..schedule import KeptNumbers, scale_kept_numbers
from .masking import BlockRates, MaskGradient

Proxy = Literal["prune", "merge"]
"""What a search learns for each block: the tokens that are left after pruning, and those after merging."""


@dataclass(frozen=True)
class Method(ABC):
    """How blocks come down to the kept tokens of a schedule. Its fields are its options.

    ``str(method)`` is the text that ``method_of`` reads: the name, and after a colon the options that are not the
    default, such as ``tome:proportional_attention=false``.
    """

    name: ClassVar[str]
    needs_training: ClassVar[bool] = False
    """Whether it runs only with an option that has to be trained for the model first."""

    def __str__(self) -> str:
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        options = [f"{name}={_text(value)}" for name, (value, default) in values.items() if value != default]
        return ":".join([self.name, ",".join(options)] if options else [self.name])

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:  # noqa: B027  most can do all
        """Raise InputValueError when the method cannot run the model, or cannot keep these numbers (by stage)."""

    @property
    def prunes_and_merges(self) -> bool:
        """Whether both numbers that a schedule has for a block count; else the tokens left after the block alone."""
        return False

    @abstractmethod
    def step(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> Step:
        """What one block does with its tokens; ``k_p`` only counts where it prunes and merges."""

    def steps(self, rules: TokenRules, numbers: KeptNumbers) -> Sequence[NewStep]:
        """What each block of a stage does, in order; for methods that have something of their own in some blocks."""
        return [partial(self.step, rules, k_p, k_m) for k_p, k_m in numbers]

    def uniform(self, stage: Stage, strength: float) -> list[int]:
        """Kept tokens of each block by the method's usual rule.

        ``strength`` is from 0, where nothing is removed, to 1, where as much is as the rule may. By default all blocks
        that the paper compresses remove the same number of tokens.
        """
        numbers, compressing = [], 0
        for compressible in stage.compressible:
            compressing += compressible
            removed = round(strength * stage.tokens * compressing)
            numbers.append(min(stage.tokens, max(stage.fewest, stage.tokens - removed)))
        return numbers

    # --- what a search has to know

    @property
    def proxies(self) -> tuple[Proxy, ...]:
        """What a search learns; nothing: the method cannot be searched. A family that is only merged goes without
        pruning."""
        return ()

    @property
    def merges_first(self) -> bool:
        """Whether a block merges before it prunes, so that of two proxies pruning has the last word."""
        return False

    def compressible(self, stage: Stage) -> tuple[bool, ...]:
        """For each block of a stage, whether it has rates."""
        return stage.compressible

    def most_removed(self, tokens: Any, prefix: int) -> Any:
        """How many of so many tokens one block can remove; None: as many as the model lets it. Of whole numbers, and
        of 0-d tensors, as the search has them on a device."""
        return None

    def search_step(
        self,
        rules: TokenRules,
        rates: BlockRates | None,
        before: TokenState,
        mask_gradient: MaskGradient = "derivative",
    ) -> Step:
        """What one block does with its tokens in the search step, where nothing is dropped but masked.

        Tokens that are masked stand behind the others, the same number in every image.
        """
        raise NotImplementedError(f"method {self.name!r} has proxies, but no search step")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def after_each_quarter(depth: int) -> list[int]:
    """The blocks in which methods with few stages remove tokens: 3, 6 and 9 of 12, counted from 0."""
    return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})


def shares_kept(stage: Stage, strength: float, blocks: Collection[int], added: int = 0) -> list[int]:
    """Kept tokens of each block where some blocks keep the same share of their patches, and add so many tokens."""
    numbers, tokens = [], stage.tokens
    for index in range(len(stage.blocks)):
        if index in blocks and strength > 0:
            stay = math.ceil((1 - strength) * (tokens - stage.prefix))
            tokens = min(tokens, max(stage.fewest, stage.prefix + stay + added))
        numbers.append(tokens)
    return numbers


class MethodPlan(Plan):
    """Kept numbers of the blocks of one stage, for so many tokens at its input, and the method that keeps them."""

    def __init__(self, method: Method, rules: TokenRules, tokens: int, numbers: KeptNumbers, fewest: int) -> None:
        self.method, self.rules, self.tokens, self.numbers, self.fewest = method, rules, tokens, numbers, fewest

    @property
    def fewest_left(self) -> int:
        return min(after for _, after in self.numbers)

    def steps(self, tokens: int, training: bool) -> Sequence[NewStep]:
        return self.method.steps(self.rules, self.numbers_for(tokens))

    def numbers_for(self, tokens: int) -> KeptNumbers:
        """What each block keeps of so many tokens: images of another size keep the rates."""
        if tokens == self.tokens:
            return self.numbers
        return scale_kept_numbers(self.numbers, self.tokens, tokens, self.rules.prefix, self.fewest)
