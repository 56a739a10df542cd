"""``diffrate schedules``: what the authors of DiffRate published."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from typing import Any

from .common import consoles
from .parsing import add_command


def add_schedules_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "schedules",
        help="the schedules that come with the package",
        description="Lists the schedules that the authors of DiffRate published: for which model, learned on which "
        "weights, at which GFLOPs (multiply-accumulates of one image). Every other model and cost has a uniform "
        "schedule (--gflops of the other commands), or one that you learn (diffrate search).",
        examples=["diffrate schedules", "diffrate schedules --model deit_small_patch16_224"],
    )
    parser.add_argument("--model", metavar="NAME", help="only those of this model, by its name in timm or in the paper")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=_schedules)


def _schedules(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from ..schedule import Schedule

    found = Schedule.available(arguments.model)
    if arguments.json:
        print(json.dumps([known._asdict() for known in found], indent=2))
        return
    results, remarks = consoles()
    if not found:
        remarks.print(
            f"No schedules were published for {arguments.model}. Take a uniform one (--gflops 60%), or learn one "
            "(diffrate search).",
            soft_wrap=True,
            markup=False,
        )
        return
    table = Table(title="Published schedules", caption="compress(model, gflops=2.9) takes them for these weights")
    for heading in ("in the paper", "weights in timm", "GFLOPs"):
        table.add_column(heading)
    for (model, weights), group in groupby(found, key=lambda known: (known.model, known.weights)):
        table.add_row(model, weights, ", ".join(f"{known.gflops:g}" for known in group))
    results.print(table)
