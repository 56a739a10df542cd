"""Which runs the paper's tables and figures are made of, and how many of them each form of the command does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .runs import SIMPLE, Run

OPERATIONS = {
    "prune": "diffrate:operations=prune",
    "merge": "diffrate:operations=merge",
    "prune, then merge": "diffrate",
    "merge, then prune": "diffrate:operations=merge_prune",
}
IMPORTANCE = {
    "class attention": "diffrate",
    "class attention x value norm": "diffrate:importance=value_norm",
    "attention received": "diffrate:importance=received",
    "random": "diffrate:importance=random",
}


@dataclass(frozen=True)
class Form:
    """How much of everything is done."""

    shares: tuple[float, ...]
    """Of the uncompressed model's FLOPs, in table 1."""
    share: float
    """The one of the other tables."""
    seeds: int
    search_steps: int
    search_images: int
    predictor_steps: int
    tuning_steps: int
    """0: no table 2."""
    lengths: tuple[int, ...]
    """Steps of search, in table 4 (d)."""
    numbers_of_images: tuple[int, ...]
    """In table 4 (c)."""
    random_schedules: int
    """Of each kind, in figure 5."""
    rounds: int
    """Of timing."""


@dataclass(frozen=True)
class Row:
    """One line of a table: the same run with several seeds."""

    label: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Part:
    """A table, or the points of a figure."""

    title: str
    rows: tuple[Row, ...]
    against: str
    """The row that the others are held against, image by image."""


def learned(form: Form, label: str, method: str, share: float, *, steps: int = 0, images: int = 0) -> Row:
    run = Run(
        method,
        share,
        "learned",
        search_steps=steps or form.search_steps,
        search_images=images or form.search_images,
    )
    return seeded(form, label, run)


def seeded(form: Form, label: str, run: Run) -> Row:
    return Row(label, tuple(run.with_seed(seed) for seed in range(form.seeds)))


def once(label: str, method: str, share: float) -> Row:
    return Row(label, (Run(method, share),))


def _dynamicvit(form: Form, share: float) -> Run:
    return Run("dynamicvit", share, predictor_steps=form.predictor_steps, search_images=form.search_images)


def table_1(form: Form, share: float) -> Part:
    rows = (
        seeded(form, "random pruning", Run("random", share)),
        once("EViT", "evit", share),
        seeded(form, "DynamicViT", _dynamicvit(form, share)),
        once("ToMe", "tome", share),
        learned(form, "ToMe, learned", "tome", share),
        once("DiffRate, uniform", "diffrate", share),
        learned(form, "DiffRate, learned", "diffrate", share),
    )
    return Part(f"{share:.0%} of the FLOPs", rows, "DiffRate, uniform")


def table_2(form: Form) -> Part:
    """Every method before and after fine-tuning; the DiffRate schedule is the learned one of the same seed."""
    pairs = []
    for row in table_1(form, form.share).rows:
        if row.label in ("EViT", "DynamicViT", "ToMe", "DiffRate, uniform", "DiffRate, learned"):
            first = row.runs[0]
            tuned = Run(**{**vars(first), "tuning_steps": form.tuning_steps})
            pairs += [row, seeded(form, f"{row.label}, fine-tuned", tuned)]
    return Part("Before and after fine-tuning", tuple(pairs), "DiffRate, learned, fine-tuned")


def table_4(form: Form) -> Iterator[Part]:
    share = form.share
    by_importance = [
        seeded(form, label, Run(method, share)) if label == "random" else once(label, method, share)
        for label, method in IMPORTANCE.items()
    ]
    yield Part("(a) Importance, uniform schedules", tuple(by_importance), "class attention")
    operations = [once(label, method, share) for label, method in OPERATIONS.items()]
    operations += [
        learned(form, f"{label}, learned", method, share)
        for label, method in OPERATIONS.items()
        if not method.endswith("merge_prune")
    ]
    yield Part("(b) Operations and their order", tuple(operations), "prune, then merge")
    matching = {"tokens": "diffrate", "keys": "diffrate:match=keys"}
    yield Part(
        "(b') What is matched, uniform schedules",
        tuple(once(label, method, share) for label, method in matching.items()),
        "tokens",
    )
    by_images = [
        learned(form, f"{count:,} images", "diffrate", share, images=count) for count in form.numbers_of_images
    ]
    yield Part("(c) Images to learn from", tuple(by_images), by_images[-1].label)
    by_steps = [learned(form, f"{steps:,} steps", "diffrate", share, steps=steps) for steps in form.lengths]
    yield Part("(d) Length of the search", (once("uniform, 0 steps", "diffrate", share), *by_steps), "uniform, 0 steps")


def simple_and_learned(form: Form, share: float) -> Part:
    """A search starts at one of the simple schedules: what does it find beyond that?"""
    simple = [Row(kind, (Run("diffrate", share, kind),)) for kind in SIMPLE]
    rows = (*simple, learned(form, "learned", "diffrate", share))
    return Part(f"{share:.0%} of the FLOPs", rows, "learned")


def figure_5(form: Form) -> Part:
    rows = []
    for label in ("prune", "merge", "prune, then merge"):
        method = OPERATIONS[label]
        runs = (Run(method, form.share, "random", seed=seed) for seed in range(form.random_schedules))
        rows.append(Row(f"{label}, random", tuple(runs)))
        rows.append(once(f"{label}, uniform", method, form.share))
        rows.append(learned(form, f"{label}, learned", method, form.share))
    return Part("Schedules of the same FLOPs", tuple(rows), "prune, then merge, uniform")


def parts(form: Form) -> dict[str, list[Part]]:
    found = {
        "Table 1": [table_1(form, share) for share in form.shares],
        "Table 4": list(table_4(form)),
        "Simple and learned schedules": [simple_and_learned(form, share) for share in form.shares],
        "Figure 5": [figure_5(form)],
    }
    if form.tuning_steps:
        found["Table 2"] = [table_2(form)]
    order = ["Table 1", "Table 2", "Simple and learned schedules", "Table 4", "Figure 5"]
    return {name: found[name] for name in order if name in found}


QUICK = Form(
    shares=(0.5,),
    share=0.5,
    seeds=1,
    search_steps=3,
    search_images=64,
    predictor_steps=2,
    tuning_steps=2,
    lengths=(1, 3),
    numbers_of_images=(32, 64),
    random_schedules=2,
    rounds=1,
)
CPU = Form(
    shares=(0.65, 0.5),
    share=0.5,
    seeds=2,
    search_steps=60,
    search_images=1000,
    predictor_steps=60,
    tuning_steps=100,
    lengths=(10, 30, 60),
    numbers_of_images=(8, 1000),
    random_schedules=6,
    rounds=5,
)
CPU_LARGE = replace(
    CPU,
    seeds=1,
    search_steps=20,
    search_images=160,
    predictor_steps=20,
    tuning_steps=0,
    lengths=(5, 20),
    numbers_of_images=(8, 160),
)
"""For models that take seconds where the embedded one takes a tenth."""
GPU = Form(
    shares=(0.8, 0.65, 0.5, 0.4),
    share=0.5,
    seeds=3,
    search_steps=1000,
    search_images=1000,
    predictor_steps=1000,
    tuning_steps=1000,
    lengths=(10, 30, 100, 300, 1000, 3000),
    numbers_of_images=(8, 64, 256, 1000),
    random_schedules=30,
    rounds=30,
)
