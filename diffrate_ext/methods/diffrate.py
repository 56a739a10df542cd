"""DiffRate: in each block tokens are sorted, pruned and merged (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from ..errors import InputValueError
from ..models.adapter import Adapter, TokenRules
from ..models.compressed import Step, TokenState
from ..schedule import KeptNumbers
from .diffrate_choices import DropByChoice, MaskByChoice
from .dropping import DropTokens
from .masking import BlockRates, MaskGradient, MaskTokens
from .method import Method, Proxy

Match = Literal["tokens", "keys"]
Operations = Literal["prune_merge", "merge_prune", "prune", "merge"]
Importance = Literal["attention", "received", "value_norm", "random"]


@dataclass(frozen=True)
class DiffRate(Method):
    """The default: importance decides what is pruned and merged, similar features what merges into what.

    Its options are the paper's choices and what one may compare them with. Those that differ take a little longer.

    Raises:
        InputValueError: an option has no such value.
    """

    match: Match = "tokens"
    """What is to be similar: the tokens' features, or the mean of their keys over heads (as in ToMe)."""
    operations: Operations = "prune_merge"
    """What a block does, in this order. ``"merge_prune"`` merges as many tokens as ``"prune_merge"`` would, but the
    least important ones, and prunes the next. With ``"prune"`` or ``"merge"`` alone, the tokens left after a block
    count."""
    importance: Importance = "attention"
    """What tokens are sorted by: the attention of the class token, or, without one, attention received;
    ``"received"``, the latter in any model; ``"value_norm"``, the class token's attention times the norm of the value
    that it weights, mean over heads; ``"random"``, nothing, by torch's generator."""

    name: ClassVar[str] = "diffrate"

    def __post_init__(self) -> None:
        for option, choices in (("match", Match), ("operations", Operations), ("importance", Importance)):
            value, known = getattr(self, option), get_args(choices)
            if value not in known:
                raise InputValueError(
                    f"option {option} of method 'diffrate' must be one of {', '.join(known)}, got {value!r}"
                )

    @property
    def prunes_and_merges(self) -> bool:
        return self.operations in ("prune_merge", "merge_prune")

    @property
    def merges_first(self) -> bool:
        return self.operations == "merge_prune"

    @property
    def proxies(self) -> tuple[Proxy, ...]:
        if self.prunes_and_merges:
            return "prune", "merge"
        return ("prune",) if self.operations == "prune" else ("merge",)

    def check(self, adapter: Adapter, numbers: Sequence[KeptNumbers]) -> None:
        if self.operations == "prune" and not adapter.prunes:
            raise InputValueError(f"a {adapter.family} is only merged, and operations=prune prunes")
        if self.importance == "value_norm" and adapter.rules.importance_from != "class":
            raise InputValueError(
                f"importance=value_norm goes by the attention of a class token, which this {adapter.family} lacks"
            )
        if self.operations == "merge":
            for stage, kept in zip(adapter.stages, numbers, strict=True):
                if min(after for _, after in kept) < min(stage.fewest, stage.tokens):
                    raise InputValueError(
                        f"operations=merge keeps a patch to merge into, {stage.fewest} tokens or more; the schedule "
                        f"keeps {min(after for _, after in kept)}"
                    )

    def step(self, rules: TokenRules, k_p: int, k_m: int, before: TokenState) -> Step:
        if self.match == "tokens" and self.operations == "prune_merge" and self.importance == "attention":
            return DropTokens(rules, k_p, k_m, before)
        return DropByChoice(self, self._rules(rules), k_p, k_m, before)

    def search_step(
        self,
        rules: TokenRules,
        rates: BlockRates | None,
        before: TokenState,
        mask_gradient: MaskGradient = "derivative",
    ) -> Step:
        rules = self._rules(rules)
        if self.match == "tokens" and not self.merges_first and self.importance in ("attention", "received"):
            return MaskTokens(rules, rates, before, mask_gradient)
        return MaskByChoice(self, rules, rates, before, mask_gradient)

    def _rules(self, rules: TokenRules) -> TokenRules:
        return replace(rules, importance_from="received") if self.importance == "received" else rules
