"""What the paper says, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from diffrate_ext.paired import Interval

from .runs import SIMPLE, Outcome
from .statistics import paired, summarize
from .tables import Form, Part, Row, figure_5, parts


@dataclass(frozen=True)
class Claim:
    """One method does better than another."""

    text: str
    part: Callable[[Form], Sequence[Part]]
    better: str
    worse: tuple[str, ...]
    """Of several the one that does best on these very pictures."""


def _named(name: str, start: str = "") -> Callable[[Form], Sequence[Part]]:
    return lambda form: [part for part in parts(form).get(name, []) if part.title.startswith(start)]


_LEARNED = "DiffRate, learned"

CLAIMS = (
    Claim("Learned rates lose less than uniform ones (figure 5)", _named("Table 1"), _LEARNED, ("DiffRate, uniform",)),
    Claim(
        "Learned rates lose less than the best of four simple schedules",
        _named("Simple and learned schedules"),
        "learned",
        SIMPLE,
    ),
    Claim("Learned DiffRate loses less than ToMe (table 1)", _named("Table 1"), _LEARNED, ("ToMe",)),
    Claim("Learned DiffRate loses less than EViT (table 1)", _named("Table 1"), _LEARNED, ("EViT",)),
    Claim("Learned DiffRate loses less than DynamicViT (table 1)", _named("Table 1"), _LEARNED, ("DynamicViT",)),
    Claim(
        "Class attention tells importance better than attention received (table 4a)",
        _named("Table 4", "(a)"),
        "class attention",
        ("attention received",),
    ),
    Claim(
        "Pruning and merging lose less than pruning alone (table 4b)",
        _named("Table 4", "(b) "),
        "prune, then merge, learned",
        ("prune, learned",),
    ),
    Claim(
        "Pruning and merging lose less than merging alone (table 4b)",
        _named("Table 4", "(b) "),
        "prune, then merge, learned",
        ("merge, learned",),
    ),
    Claim(
        "Pruning before merging loses less than merging first (table 4b)",
        _named("Table 4", "(b) "),
        "prune, then merge",
        ("merge, then prune",),
    ),
    Claim("Fine-tuning at the schedule helps (table 2)", _named("Table 2"), f"{_LEARNED}, fine-tuned", (_LEARNED,)),
)


@dataclass(frozen=True)
class Judged:
    """A claim at one place of the report."""

    claim: Claim
    part: Part
    interval: Interval

    @property
    def verdict(self) -> str:
        if self.interval.high < 0:
            return "holds"
        return "does not hold: the other way round" if self.interval.low > 0 else "cannot be told"


def judge(form: Form, outcomes: Callable[[Row], list[Outcome]]) -> Iterator[Judged]:
    """Every claim wherever both of its rows were done."""
    for claim in CLAIMS:
        for part in claim.part(form):
            rows = {row.label: row for row in part.rows}
            better, rivals = outcomes(rows[claim.better]), [outcomes(rows[label]) for label in claim.worse]
            if better and any(rivals):
                best = min(filter(None, rivals), key=lambda found: summarize(found).error)
                yield Judged(claim, part, paired(better, best))


def better_than_random(form: Form, outcomes: Callable[[Row], list[Outcome]], kind: str) -> tuple[int, int] | None:
    """How many of figure 5's random schedules of a kind the learned one beats, and of how many."""
    rows = {row.label: row for row in figure_5(form).rows}
    drawn, learned = outcomes(rows[f"{kind}, random"]), outcomes(rows[f"{kind}, learned"])
    if not drawn or not learned:
        return None
    ours = sum(float(outcome.errors.mean()) for outcome in learned) / len(learned)
    return sum(float(outcome.errors.mean()) > ours for outcome in drawn), len(drawn)
