"""The progress of training on a console: a bar, or a line now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from .records import Measure

SMOOTHING = 0.9
"""Share of the earlier steps in the loss and the accuracy that are shown: those of single batches jump."""
LINES = 20
"""How many lines a run leaves where there is no terminal for a bar."""
BAR, NARROW_BAR, NARROW = 24, 8, 100
"""Widths of the bar, and of the terminal from which on it is the wide one."""
REMAINING = "ETA 0:00:00"


class RunningMeans:
    """Means over the last steps, the earlier ones counting less and less."""

    def __init__(self, n: int) -> None:
        self.sums, self.weight = [0.0] * n, 0.0

    def __call__(self, *values: float) -> list[float]:
        self.weight = SMOOTHING * self.weight + 1
        self.sums = [SMOOTHING * total + value for total, value in zip(self.sums, values, strict=True)]
        return [total / self.weight for total in self.sums]


def in_words(measure: Measure, loss: float, accuracy: float) -> list[str]:
    """What to say of a step, the most important first."""
    return [f"cosine {accuracy:.4f}"] if measure == "cosine" else [f"loss {loss:.3f}", f"{measure} {accuracy:.1%}"]


@contextmanager
def progress_of_steps(console: Console, name: str, steps: int) -> Iterator[Callable[[int, Sequence[str]], None]]:
    """Within a ``with`` block, a function that is told each step, counted from 0, and what to say of it.

    Args:
        console: where to show it: a bar on a terminal, else some lines. A narrow terminal shows as much of what is said
            as it has room for, the first thing always.
        name: what is trained.
        steps: how many there are.
    """
    if not console.is_terminal:

        def line(step: int, words: Sequence[str]) -> None:
            done = step + 1
            if done * LINES // steps > step * LINES // steps or done == 1:
                console.print(f"{name}  step {done}/{steps}  {'  '.join(words)}", soft_wrap=True, markup=False)

        yield line
        return
    bar_width = NARROW_BAR if console.width < NARROW else BAR
    fixed = (name, "━" * bar_width, f"{steps}/{steps}", REMAINING)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", markup=False),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task(name, total=steps, words="", start=False)
        resumed = False

        def bar(step: int, words: Sequence[str]) -> None:
            nonlocal resumed
            if not resumed:  # a resumed run does not start at 0: its speed is that of this run
                progress.update(task, completed=step)
                progress.start_task(task)
                resumed = True
            room = console.width - sum(len(part) + 1 for part in fixed)
            progress.update(task, completed=step + 1, words=_fitting(words, room))

        yield bar


def _fitting(words: Sequence[str], room: int) -> str:
    """As many of the words as there is room for, but the first of them always."""
    shown = words[0]
    for more in words[1:]:
        if len(shown) + 2 + len(more) > room:
            break
        shown += f"  {more}"
    return shown
