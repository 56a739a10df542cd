"""What compression does to one model on some images: accuracy, speed, and a picture of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from . import embedded
from .compression.choice import NamedSchedule, named_uniform
from .compression.copies import compressed_copy
from .compression.flops import flops
from .compression.uniform import SHARES, uniform_schedule
from .errors import InputValueError
from .evaluation import Evaluation, evaluate
from .machine import place
from .painting import Paint
from .schedule import Schedule
from .timing import Benchmark, Comparison
from .visualization import schedule_name, visualize

DRAWN_SHARE = 2 / 3
"""Of the uncompressed model's FLOPs: enough is removed to see how, and enough is left to see what."""


@dataclass(frozen=True)
class Workload:
    """A model and the images it is shown on."""

    name: str
    model: nn.Module
    images: Tensor
    """(n, C, H, W), normalised as the model expects them."""
    titles: list[str]
    """A short text for each image."""
    labels: Tensor | None = None
    """(n,) int64, where they are known."""

    def batches(self, size: int) -> list[Tensor | list[Tensor]]:
        """The images in batches, with their labels where they are known."""
        if self.labels is None:
            return list(self.images.split(size))
        return [[i, t] for i, t in zip(self.images.split(size), self.labels.split(size), strict=True)]


def embedded_workload(n_images: int | None = None, weights: Path | None = None) -> Workload:
    """The embedded model on the first ``n_images`` (default: all 2,000) of the embedded test images.

    Args:
        weights: as for :func:`embedded.load_model`.

    Raises:
        InputValueError: fewer than one image, or more than there are; weights of another model.
    """
    images, labels = embedded.load_images("test")
    n = len(images) if n_images is None else n_images
    if not 1 <= n <= len(images):
        raise InputValueError(f"the number of images must lie in 1 .. {len(images)}, the embedded test images; got {n}")
    titles = [embedded.CLASSES[label] for label in labels[:n]]
    return Workload("embedded ViT", embedded.load_model(weights), embedded.normalize(images[:n]), titles, labels[:n])


def uniform_schedules(model: nn.Module, method: str = "diffrate") -> list[NamedSchedule]:
    """A method's simple rule at the default targets."""
    return [named_uniform(model, f"{share:.0%}", method) for share in SHARES]


def learned_schedule(workload: Workload, steps: int, console: Console) -> list[NamedSchedule]:
    """The simple rule at the default target of the search, and what a search on the embedded training images finds."""
    from .embedded_search import search_embedded
    from .rate_search.report import progress_report

    gflops = round(embedded.SEARCH_SHARE * flops(workload.model) / 1e9, 4)
    with progress_report(console, "search", steps, f"{gflops:.4g} GFLOPs", measure="agreement") as report:
        found = search_embedded(gflops, steps=steps, report=report)
    share = f"{embedded.SEARCH_SHARE:.0%}"
    return [
        NamedSchedule(f"uniform {share}", uniform_schedule(workload.model, gflops)),
        NamedSchedule(f"learned {share}", found.schedule),
    ]


def published_schedules(name: str) -> list[NamedSchedule]:
    """The authors' schedules for a model of timm, the mildest first; none where they published none."""
    return [
        NamedSchedule(f"published {known.gflops:g}", Schedule.published(name, known.gflops))
        for known in Schedule.available(name)
    ]


@dataclass(frozen=True)
class DemoResult:
    """All that the demo measured, the schedules in their given order."""

    uncompressed: Evaluation
    compressed: list[Evaluation]
    speed: list[Benchmark]


def measure(
    workload: Workload, schedules: Sequence[NamedSchedule], *, batch_size: int, rounds: int, console: Console
) -> DemoResult:
    """Accuracy on all images of the workload, and speed on one batch of them, with progress bars on ``console``."""
    device = next(workload.model.parameters()).device
    batches = workload.batches(batch_size)
    with Progress(
        TextColumn("{task.description:<19}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        names = ["uncompressed", *(named.name for named in schedules)]
        tasks = [progress.add_task(name, total=len(batches), unit="batches") for name in names]
        timing = progress.add_task("timing, interleaved", total=rounds, unit="rounds")
        uncompressed = evaluate(workload.model, progress.track(batches, task_id=tasks[0]))
        compressed = [
            evaluate(
                compressed_copy(workload.model, named.schedule),
                progress.track(batches, task_id=task),
                uncompressed.predictions,
            )
            for named, task in zip(schedules, tasks[1:], strict=True)
        ]
        comparison = Comparison(
            workload.model, [named.schedule for named in schedules], workload.images[:batch_size].to(device)
        )
        for done in comparison.run(rounds):
            progress.update(timing, completed=done)
    return DemoResult(uncompressed, compressed, comparison.results())


def results_table(workload: Workload, schedules: Sequence[NamedSchedule], result: DemoResult) -> Table:
    """The measurements as a table: one row for the uncompressed model, one for each schedule."""
    first = result.speed[0]
    device = next(workload.model.parameters()).device
    table = Table(
        title=f"{workload.name}, {result.uncompressed.n:,} images",
        caption=f"agreement: same class as uncompressed; speed: medians of {first.rounds} interleaved rounds, "
        f"± half the distance between quartiles, batches of {first.batch_size}, {place(str(device))}",
        pad_edge=False,  # for terminals of 80 columns
    )
    add_names_column(table)
    for heading in ("GFLOPs", "loss", "top-1", "agree-\nment", "images\n/s", "speed\nup", "FLOPs\nratio"):
        table.add_column(heading, justify="right")
    table.add_row(
        "uncompressed",
        f"{first.uncompressed_gflops:.3g}",
        _number(result.uncompressed.loss),
        percent(result.uncompressed.top1),
        percent(1.0),
        f"{first.uncompressed_images_per_second:.4g}",
        "1.00x",
        "1.00x",
    )
    for named, evaluation, speed in zip(schedules, result.compressed, result.speed, strict=True):
        table.add_row(
            named.name,
            f"{speed.gflops:.3g}",
            _number(evaluation.loss),
            percent(evaluation.top1),
            percent(evaluation.agreement),
            f"{speed.images_per_second:.4g}",
            with_spread(speed),
            f"{speed.flops_ratio:.2f}x",
        )
    return table


def draw(
    workload: Workload,
    schedules: Sequence[NamedSchedule],
    output: Path,
    *,
    n_images: int = 4,
    blocks: Sequence[int] | None = None,
    paint: Paint = "mean",
) -> None:
    """Write a picture of a moderate schedule on a few images, all different in title where possible.

    Of several schedules it draws the one with the FLOPs nearest to ``DRAWN_SHARE``; of those that are as near, within
    1 % of the model's FLOPs, the last.
    """
    uncompressed = flops(workload.model)
    away = [abs(flops(workload.model, named.schedule) / uncompressed - DRAWN_SHARE) for named in schedules]
    *_, drawn = (named for named, distance in zip(schedules, away, strict=True) if distance <= min(away) + 0.01)
    first_of_title = {title: i for i, title in reversed(list(enumerate(workload.titles)))}
    chosen = sorted(first_of_title.values())
    chosen = (chosen + [i for i in range(len(workload.titles)) if i not in chosen])[:n_images]
    own = next(workload.model.parameters())
    in_order = [drawn, *(named for named in schedules if named is not drawn)]
    figure = visualize(
        workload.model,
        workload.images[chosen].to(own.device, own.dtype),
        drawn.schedule,
        others=[named.schedule for named in in_order[1:]],
        names=[schedule_name(workload.model, named.schedule, named.name) for named in in_order],
        blocks=blocks,
        titles=[workload.titles[i] for i in chosen],
        paint=paint,
        title=workload.name,
        any_model=True,  # whoever chose the schedules has checked that
    )
    figure.savefig(output, dpi=110)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def with_spread(speed: Benchmark) -> str:
    """A speed-up, for a table."""
    return f"{speed.speed_up:.2f}x ±{speed.speed_up_spread:.2f}"


def add_names_column(table: Table) -> None:
    """The first column: long names, such as those with a file of predictors, leave room for the numbers."""
    table.add_column("", overflow="fold", max_width=24)


def percent(share: float | None) -> str:
    """For a table."""
    return "-" if share is None else f"{share:.1%}"
