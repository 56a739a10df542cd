"""What a running search tells: a progress bar, or a line now and then, and a log for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from .history import StepRecord

Report = Callable[["StepRecord"], None]
Measure = Literal["accuracy", "agreement", "cosine"]
"""What the accuracy of the records is: with soft targets agreement with the uncompressed model, of features cosine."""

SMOOTHING = 0.9
"""Share of the earlier steps in the loss and the accuracy that are shown: those of single batches jump."""
LINES = 20
"""How many lines a search leaves where there is no terminal for a bar."""


class _RunningMeans:
    """Means over the last steps, the earlier ones counting less and less."""

    def __init__(self, n: int) -> None:
        self.sums, self.weight = [0.0] * n, 0.0

    def __call__(self, *values: float) -> list[float]:
        self.weight = SMOOTHING * self.weight + 1
        self.sums = [SMOOTHING * total + value for total, value in zip(self.sums, values, strict=True)]
        return [total / self.weight for total in self.sums]


@contextmanager
def progress_report(
    console: Console, name: str, steps: int, target_gflops: float, *, measure: Measure = "accuracy"
) -> Iterator[Report]:
    """Within a ``with`` block, a report that shows the progress of a search.

    Args:
        console: where to show it: a bar on a terminal, else some lines.
        name: what is searched for.
        steps: the length of the search.
        target_gflops: where it is to go.
        measure: what the records' accuracy is.
    """
    means = _RunningMeans(2)

    def describe(record: StepRecord) -> str:
        loss, accuracy = means(record.loss, record.accuracy)
        gflops = f"{record.gflops:.4g} -> {target_gflops:.4g} GFLOPs"
        numbers = f"cosine {accuracy:.4f}" if measure == "cosine" else f"loss {loss:.3f}  {measure} {accuracy:.1%}"
        return f"{numbers}  {gflops}"

    if not console.is_terminal:

        def line(record: StepRecord) -> None:
            words, done = describe(record), record.step + 1
            if done * LINES // steps > record.step * LINES // steps or done == 1:
                console.print(f"{name}  step {done}/{steps}  {words}", soft_wrap=True, markup=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task(name, total=steps, words="", start=False)
        resumed = False

        def bar(record: StepRecord) -> None:
            nonlocal resumed
            if not resumed:  # a resumed search does not start at 0: its speed is that of this run
                progress.update(task, completed=record.step)
                progress.start_task(task)
                resumed = True
            progress.update(task, completed=record.step + 1, words=describe(record))

        yield bar


@contextmanager
def tensorboard_report(folder: Path) -> Iterator[Report]:
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
            "gflops": record.gflops,
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
