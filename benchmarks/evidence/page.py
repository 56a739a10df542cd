"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from report import machine_line

from .claims import better_than_random, judge
from .runs import Outcome, Run
from .statistics import paired, summarize
from .subjects import Subject
from .tables import Form, Part, Row, parts

Outcomes = Callable[[Row], list[Outcome]]
"""Those of a row's runs that were done."""


def report(
    sections: Mapping[Subject, tuple[Form, Outcomes, Mapping[str, float]]], machine: dict[str, Any], command: str
) -> str:
    """The whole page.

    Args:
        sections: of each subject the form, its outcomes, and the speed-up of rows by table part and label.
        machine: as ``machine.describe`` has it.
        command: what made it.
    """
    lines = [
        "# The paper's evidence in small",
        "",
        f"Made by `{command}`.",
        "",
        machine_line(machine),
        "",
        "Every row is one way to compress a trained model to the FLOPs that its table names; no weights change unless "
        "it says fine-tuned. **Error** is the cross-entropy on pictures that nothing was learned from or, for a model "
        "without classes, 1 - cosine between its features and the uncompressed model's. **Against** a row: the mean "
        "difference of the errors on the same pictures (negative: smaller errors), with its 95 % interval over "
        "pictures and seeds. ± is the standard deviation over seeds. Agreement: the share of pictures that get "
        "the same class as by the uncompressed model.",
    ]
    for subject, (form, outcomes, speed_ups) in sections.items():
        lines += ["", f"## {subject.title}", "", *_subject(subject, form, outcomes, speed_ups)]
    return "\n".join(lines) + "\n"


def _subject(subject: Subject, form: Form, outcomes: Outcomes, speed_ups: Mapping[str, float]) -> Iterator[str]:
    (uncompressed,) = outcomes(Row("", (Run(),)))
    base = summarize([uncompressed])
    count = f"{len(uncompressed.errors):,} pictures; uncompressed: {base.gflops:.3g} GFLOPs"
    yield count + (f", top-1 {base.top1:.2%}, error {base.error:.4f}." if base.top1 is not None else ".")
    yield ""
    yield (
        f"Learned: rates searched for {form.search_steps} steps of {subject.batch_size} pictures, out of "
        f"{form.search_images}, from the best of four simple schedules, with the uncompressed model's answers as "
        f"targets. DynamicViT: predictors trained for {form.predictor_steps} steps. Random, learned and trained rows: "
        f"{form.seeds} seeds."
    )
    yield from _claims(form, outcomes)
    for name, found in parts(form).items():
        if name == "Figure 5":
            yield from ["", f"### {name}", "", f"![{name}](figure_5_{subject.name}.png)"]
            continue
        for part in found:
            yield from ["", f"### {name}: {part.title}", "", *_table(part, outcomes, speed_ups)]
    yield from ["", "### Figure 6", "", f"![Figure 6](figure_6_{subject.name}.png)"]


def _claims(form: Form, outcomes: Outcomes) -> Iterator[str]:
    judged = list(judge(form, outcomes))
    if not judged:
        return
    yield from ["", "| claim | where | difference of the errors | here |", "| --- | --- | --- | --- |"]
    for one in judged:
        at = one.interval
        difference = f"{at.mean:+.4f} ({at.low:+.4f} to {at.high:+.4f})"
        yield f"| {one.claim.text} | {one.part.title} | {difference} | {one.verdict} |"
    for kind in ("prune", "merge", "prune, then merge"):
        found = better_than_random(form, outcomes, kind)
        if found is not None:
            beaten, drawn = found
            yield f"| Learned beats random schedules (figure 5) | {kind} | | better than {beaten} of {drawn} |"


def _table(part: Part, outcomes: Outcomes, speed_ups: Mapping[str, float]) -> Iterator[str]:
    rows = {row.label: outcomes(row) for row in part.rows}
    if not any(rows.values()):
        yield "Not done."
        return
    with_classes = any(found[0].hits is not None for found in rows.values() if found)
    headings = ["", *(["top-1", "agreement"] if with_classes else []), "error", f"against *{part.against}*", "GFLOPs"]
    timed = any(_timed(part, label) in speed_ups for label in rows)
    headings += ["speed-up"] if timed else []
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    reference = rows[part.against]
    for label, found in rows.items():
        if not found:
            yield f"| {label} |" + " cannot go so low |" + " |" * (len(headings) - 2)
            continue
        one = summarize(found)
        spread = one.seeds > 1
        cells = [label]
        if with_classes:
            assert one.top1 is not None
            assert one.agreement is not None
            cells.append(f"{one.top1:.2%}" + (f" ± {100 * (one.top1_spread or 0):.2f}" if spread else ""))
            cells.append(f"{one.agreement:.2%}")
        cells.append(f"{one.error:.4f}" + (f" ± {one.error_spread:.4f}" if spread else ""))
        if label == part.against or not reference:
            cells.append("")
        else:
            at = paired(found, reference)
            cells.append(f"{at.mean:+.4f} ({at.low:+.4f} to {at.high:+.4f})")
        cells.append(f"{one.gflops:.3g}")
        if timed:
            speed_up = speed_ups.get(_timed(part, label))
            cells.append("" if speed_up is None else f"{speed_up:.2f}x")
        yield f"| {' | '.join(cells)} |"


def _timed(part: Part, label: str) -> str:
    return f"{part.title}: {label}"
