"""``diffrate compare``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_any_model_option,
    add_model_options,
    add_timing_options,
    consoles,
    device_named,
    say_if_busy,
    schedules_in,
)
from .parsing import UsageError, add_command, gflops_target
from .workload import PICTURES_BY_DEFAULT, add_picture_options, workload_named

if TYPE_CHECKING:
    from rich.table import Table

    from ..comparison import Compared


def add_compare_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        help="methods of token compression side by side on a model and your pictures",
        description="Compresses a model by each method to the same FLOPs and says how much of its results stays and "
        "how much faster it becomes. Without --model: the embedded model on embedded test images, with labels.",
        examples=[
            "diffrate compare",
            "diffrate compare --model deit_small_patch16_224 --images photos/ --gflops 60%",
            "diffrate compare --methods diffrate tome --gflops 70% 50%",
        ],
    )
    add_model_options(parser)
    add_picture_options(parser, f"default: all 2,000 embedded ones; {PICTURES_BY_DEFAULT} of yours, evenly spread")
    parser.add_argument(
        "--gflops",
        type=gflops_target,
        nargs="+",
        metavar="G",
        help="targets, in GFLOPs or as shares of the model's such as 60%% (default: 80%%, 65%% and 50%%; none beside "
        "--schedule)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="names with options, as for --method (default: all that can run the model)",
    )
    parser.add_argument(
        "--schedule", type=Path, nargs="+", metavar="FILE", help="schedules as a search writes them, by DiffRate"
    )
    add_any_model_option(parser)
    add_timing_options(parser, batch_size=32, rounds=10)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("diffrate_compare.png"),
        metavar="FILE",
        help="the plot (default: diffrate_compare.png)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from rich.progress import Progress

    from ..comparison import compare
    from ..comparison_plot import draw_comparison
    from ..methods import METHODS
    from ..visualization import check_output

    output = check_output(arguments.output)
    results, remarks = consoles()
    workload = workload_named(arguments, PICTURES_BY_DEFAULT, None, remarks)
    workload.model.to(device_named(arguments))
    paths = arguments.schedule or []
    schedules = {
        named.name: named.schedule for named in schedules_in(paths, workload.model, any_model=arguments.any_model)
    }
    if len(schedules) < len(paths):
        raise UsageError("--schedule: two files have one name; rename one of them or its folder")
    if arguments.no_pretrained:
        remarks.print("Random weights: the speed is real, the rest says nothing about the trained model.")
    batches = workload.batches(arguments.batch_size)
    progress = Progress(console=remarks)
    tasks = {
        "images": progress.add_task("images", total=len(batches)),
        "timing": progress.add_task("timing, interleaved", total=arguments.rounds),
    }
    with ExitStack() as while_running:

        def show(what: str, done: int) -> None:
            if not progress.live.is_started:  # not before: an error of the arguments comes alone
                say_if_busy(remarks)
                while_running.enter_context(progress)
            progress.update(tasks[what], completed=done)

        rows = compare(
            workload.model,
            batches,
            arguments.gflops,
            arguments.methods,
            schedules=schedules,
            any_model=True,  # whoever chose the schedules has checked that
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            on_progress=show,
        )
    reached = Counter(row.method for row in rows if row.uniform)
    most = max(reached.values(), default=0)
    for method, cls in METHODS.items() if arguments.methods is None else ():
        if reached[method] < most and not cls.needs_training:
            remarks.print(
                f"{method} cannot run this model, or not reach all targets: {reached[method]} of {most} are shown"
            )
    draw_comparison(rows, workload.name).savefig(output, dpi=110)
    if arguments.json:
        print(json.dumps([_record(row) for row in rows], indent=2))
        return
    results.print(_table(rows, workload.name, arguments))
    results.print(f"Plot: {output}", soft_wrap=True, markup=False)


def _record(row: Compared) -> dict[str, Any]:
    schedule, speed = row.schedule, row.speed
    return {
        "method": row.method,
        "schedule": row.label,
        "gflops": row.gflops,
        "images": row.evaluation.n,
        "top1": row.evaluation.top1,
        "loss": row.evaluation.loss,
        "agreement": row.evaluation.agreement,
        "cosine": row.cosine,
        "images_per_second": None if speed is None else speed.images_per_second,
        "speed_up": None if speed is None else speed.speed_up,
        "after_pruning": None if schedule is None else schedule.after_pruning,
        "after_merging": None if schedule is None else schedule.after_merging,
    }


def _table(rows: list[Compared], name: str, arguments: argparse.Namespace) -> Table:
    from rich.table import Table

    from ..demo import add_names_column, percent
    from ..machine import place

    first, *others = rows
    table = Table(
        title=f"{name}, {first.evaluation.n:,} images",
        caption="agreement: same class as uncompressed; cosine: of the pooled features and the uncompressed model's; "
        f"speed: medians of {arguments.rounds} interleaved rounds, batches of {arguments.batch_size}, "
        f"{place(arguments.device)}",
    )
    add_names_column(table)
    for heading in ("GFLOPs", "top-1", "agreement", "cosine", "images/s", "speed-up"):
        table.add_column(heading, justify="right")
    before = first.method
    for row in rows:
        if row.method != before:
            table.add_section()
        before = row.method
        speed = row.speed or others[0].speed
        assert speed is not None
        rate = speed.uncompressed_images_per_second if row.speed is None else speed.images_per_second
        table.add_row(
            f"{row.method} {row.label}".strip(),
            f"{row.gflops:.3g}",
            percent(row.evaluation.top1),
            percent(row.evaluation.agreement),
            f"{row.cosine:.4f}",
            f"{rate:.4g}",
            "1.00x" if row.speed is None else f"{row.speed.speed_up:.2f}x",
        )
    return table
