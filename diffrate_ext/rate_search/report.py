"""What a running search tells: a progress bar, or a line now and then, and a log for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.progress import RunningMeans, in_words, progress_of_steps

if TYPE_CHECKING:
    from rich.console import Console

    from ..compression.costing import Unit
    from ..training.records import Measure
    from .history import StepRecord

Report = Callable[["StepRecord"], None]


@contextmanager
def progress_report(
    console: Console, name: str, steps: int, target: str, *, unit: Unit = "GFLOPs", measure: Measure = "accuracy"
) -> Iterator[Report]:
    """Within a ``with`` block, a report that shows the progress of a search.

    Args:
        console: where to show it: a bar on a terminal, else some lines.
        name: what is searched for.
        steps: the length of the search.
        target: where it is to go, with its unit.
        unit: of what the records cost.
        measure: what the records' accuracy is.
    """
    means = RunningMeans(2)
    explained = False
    good = "the cosine should rise" if measure == "cosine" else f"the loss should fall and the {measure} rise"

    with progress_of_steps(console, name, steps) as show:

        def report(record: StepRecord) -> None:
            nonlocal explained
            if not explained:  # not before: a search that was finished before says nothing
                console.print(f"{name}: {good}, at a cost of {target}", soft_wrap=True, markup=False)
                explained = True
            words = in_words(measure, *means(record.loss, record.accuracy))
            show(record.step, [*words, f"now {record.cost:.4g} {unit}"])

        yield report


@contextmanager
def tensorboard_report(folder: Path, unit: Unit = "GFLOPs") -> Iterator[Report]:
    """Within a ``with`` block, a report that logs every step for TensorBoard in ``folder``.

    Raises:
        ModuleNotFoundError: the package tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def log(record: StepRecord) -> None:
        nonlocal writer
        if writer is None:  # of a resumed search: what an earlier run logged after its last checkpoint goes
            writer = SummaryWriter(str(folder), purge_step=record.step)
        scalars = {
            "loss/classification": record.loss,
            "loss/flops": record.flops_loss,
            "accuracy": record.accuracy,
            "gflops" if unit == "GFLOPs" else "milliseconds": record.cost,
            "learning_rate": record.lr,
        }
        for kind, numbers in (("pruning", record.after_pruning), ("merging", record.after_merging)):
            scalars |= {f"kept after {kind}/block {i}": n for i, n in enumerate(numbers or (), start=1)}
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, record.step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


def all_reports(reports: Sequence[Report]) -> Report:
    """One report that calls several."""

    def report(record: StepRecord) -> None:
        for one in reports:
            one(record)

    return report
