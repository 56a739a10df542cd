"""Targets of time, and the cost table that they need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .parsing import UsageError, positive_amount

if TYPE_CHECKING:
    from torch import nn

    from ..cost_table import CostTable


def add_time_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--speedup",
        type=positive_amount,
        nargs="+",
        metavar="X",
        help="in place of --gflops: how many times as fast as uncompressed the model is to be, by --costs",
    )
    parser.add_argument(
        "--latency",
        type=positive_amount,
        nargs="+",
        metavar="MS",
        help="in place of --gflops: milliseconds of a batch, of the size that --costs was measured with",
    )
    parser.add_argument(
        "--costs", type=Path, metavar="FILE", help="what diffrate profile measured, for --speedup and --latency"
    )


def costs_named(arguments: argparse.Namespace, model: nn.Module) -> CostTable | None:
    """The ``--costs`` of targets of time; None where targets are of FLOPs."""
    from ..compression.costing import costing_of
    from ..cost_table import CostTable

    timed = [f"--{name}" for name in ("speedup", "latency") if getattr(arguments, name)]
    if not timed:
        if arguments.costs is not None:
            raise UsageError("--costs are for targets of time: add --speedup or --latency")
        return None
    if arguments.gflops:
        raise UsageError(f"--gflops and {timed[0]} name different kinds of targets: take one")
    if arguments.costs is None:
        raise UsageError(f"{timed[0]} needs --costs FILE, which diffrate profile writes")
    costs = CostTable.load(arguments.costs)
    costing_of(model, costs)  # is it this model's?
    return costs
