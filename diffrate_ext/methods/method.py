"""What a method of token compression has to tell, and the plan that carries one out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

from ..models.adapter import Adapter, Stage, TokenRules
from ..models.compressed import NewStep, Plan, Step, TokenState
from ..schedule import KeptNumbers, scale_kept_numbers


@dataclass(frozen=True)
class Method(ABC):
    """How blocks come down to the kept tokens of a schedule. Its fields are its options.

    ``str(method)`` is the text that ``method_of`` reads: the name, and after a colon the options that are not the
    default, such as ``tome:proportional_attention=false``.
    """

    name: ClassVar[str]
    prunes_and_merges: ClassVar[bool] = False
    """Whether both numbers that a schedule has for a block count; else the tokens left after the block alone."""

    def __str__(self) -> str:
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        options = [f"{name}={_text(value)}" for name, (value, default) in values.items() if value != default]
        return ":".join([self.name, ",".join(options)] if options else [self.name])

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:  # noqa: B027  most can do all
        """Raise InputValueError when the method cannot run the model, or cannot keep these numbers (by stage)."""

    @abstractmethod
    def step(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> Step:
        """What one block does with its tokens; ``k_p`` only counts where it prunes and merges."""

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


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class MethodPlan(Plan):
    """Kept numbers of the blocks of one stage, for so many tokens at its input, and the method that keeps them."""

    def __init__(self, method: Method, rules: TokenRules, tokens: int, numbers: KeptNumbers, fewest: int) -> None:
        self.method, self.rules, self.tokens, self.numbers, self.fewest = method, rules, tokens, numbers, fewest

    def steps(self, tokens: int, training: bool) -> Sequence[NewStep]:
        numbers = self.numbers
        if tokens != self.tokens:  # images of another size keep the rates
            numbers = scale_kept_numbers(numbers, self.tokens, tokens, self.rules.prefix, self.fewest)
        return [partial(self.method.step, self.rules, k_p, k_m) for k_p, k_m in numbers]
