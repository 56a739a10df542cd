"""``diffrate profile``: what a model's blocks cost in time by their tokens, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_timing_options, consoles, say_if_busy
from .costs import TRUSTED
from .parsing import UsageError, add_command, method_text
from .untrained import add_untrained_options, untrained_named

if TYPE_CHECKING:
    from torch import nn

    from ..cost_table import CostTable

CHECKED = ("80%", "60%", "50%")
"""Uniform schedules of so much of the FLOPs are measured, to see what the table says of them."""


def add_profile_command(commands: Any) -> None:
    """Add ``profile`` to the commands of a parser."""
    parser = add_command(
        commands,
        "profile",
        help="measure what tokens cost in time on this machine",
        description="Times the pieces of a model's blocks over numbers of tokens and writes a cost table, by which "
        "diffrate search learns a schedule for time (--speedup 1.5 --costs FILE) instead of FLOPs. Ends with what the "
        "table says of some schedules beside what they take. Weights are random: they do not matter for the speed.",
        examples=[
            "diffrate profile",
            "diffrate profile --model vit_base_patch16_224 --device cuda --dtype bfloat16 --batch-size 32",
        ],
    )
    add_untrained_options(parser)
    parser.add_argument(
        "--method", type=method_text, default="diffrate", metavar="NAME", help="what removes tokens (default: diffrate)"
    )
    add_timing_options(parser, batch_size=16, rounds=5)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("diffrate_costs.json"),
        metavar="FILE",
        help="the cost table (default: diffrate_costs.json); its plot goes beside it",
    )
    parser.set_defaults(command=_profile)


def _profile(arguments: argparse.Namespace) -> None:
    from rich.progress import Progress

    from ..profile_plot import draw_costs
    from ..profiling import profile_model
    from ..visualization import check_output

    table_file = arguments.output
    if table_file.suffix != ".json":
        raise UsageError(f"--output: expected a name that ends in .json, beside which the plot goes; got {table_file}")
    if table_file.is_dir() or not table_file.parent.is_dir():
        raise UsageError(f"--output: {table_file} is a folder, or there is none to hold it")
    plot = check_output(table_file.with_suffix(".png"))
    results, remarks = consoles()
    model = untrained_named(arguments)
    say_if_busy(remarks)
    with Progress(console=remarks) as progress:
        task = progress.add_task("timing blocks", total=None)
        table = profile_model(
            model,
            batch_size=arguments.batch_size,
            method=arguments.method,
            rounds=arguments.rounds,
            on_progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    table.save(table_file)
    draw_costs(table).savefig(plot, dpi=110)
    checks, off = _checks(model, table, arguments.rounds)
    results.print(checks)
    if off > TRUSTED:
        remarks.print(
            f"The table is off by {off:.0%}: measure again, with more --rounds or when nothing else runs.",
            style="yellow",
            soft_wrap=True,
        )
    results.print(f"Cost table: {table_file}\nPlot: {plot}", soft_wrap=True, markup=False)


def _checks(model: nn.Module, table: CostTable, rounds: int) -> tuple[Any, float]:
    """What the table says of uniform schedules, and what they take; and by how much a speed-up is off at most."""
    from rich.table import Table

    from ..compression.costing import costing_of
    from ..compression.uniform import uniform_schedule
    from ..errors import InputValueError
    from ..timing import Comparison, random_images

    schedules = {}
    for share in CHECKED:
        try:
            schedules[share] = uniform_schedule(model, share, method=table.method)
        except InputValueError:  # CAFormer, say, cannot go down as far
            continue
    comparison = Comparison(model, list(schedules.values()), random_images(model, table.batch_size))
    costing = costing_of(model, table)
    shown = Table(title=f"{table.model or 'model'}, batch of {table.batch_size}, {table.device}")
    for heading in ("FLOPs", "ms by the table", "ms measured", "off", "speed-up by the table", "measured"):
        shown.add_column(heading, justify="right")
    uncompressed, most = costing.uncompressed, 0.0
    took = table.uncompressed
    shown.add_row("100%", f"{uncompressed:.4g}", f"{took:.4g}", f"{uncompressed / took - 1:+.1%}")
    for (share, schedule), measured in zip(schedules.items(), comparison.measured(rounds), strict=True):
        told = costing.of_schedule(schedule)
        took = 1e3 * measured.seconds
        cells = f"{told:.4g}", f"{took:.4g}", f"{told / took - 1:+.1%}", f"{uncompressed / told:.2f}x"
        shown.add_row(share, *cells, f"{measured.speed_up:.2f}x ±{measured.speed_up_spread:.2f}")
        most = max(most, abs(uncompressed / told / measured.speed_up - 1))
    return shown, most
