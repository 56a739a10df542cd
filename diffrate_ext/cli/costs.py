"""Targets of time, and the cost table that they need."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .parsing import UsageError, positive_amount

if TYPE_CHECKING:
    from torch import nn

    from ..cost_table import CostTable
    from ..schedule import Schedule
    from ..timing import Benchmark

TRUSTED = 0.05
"""Share by which speed-ups by a table may be off those that are measured."""
ROUNDS = 7
"""Of timing what a search found."""


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


def same_machine(model: nn.Module, costs: CostTable) -> bool:
    """Whether a cost table was measured on what the model would run on here."""
    import torch

    from ..machine import processor

    device = next(model.parameters()).device
    return processor(device) == costs.device and (device.type != "cpu" or torch.get_num_threads() == costs.threads)


def measured_by(costs: CostTable, model: nn.Module, schedules: Sequence[Schedule]) -> list[Benchmark]:
    """What the model takes under schedules, measured as the table was: its batch size and dtype, random images."""
    import torch

    from ..timing import Comparison, random_images

    model = copy.deepcopy(model).to(getattr(torch, costs.dtype))
    return Comparison(model, schedules, random_images(model, costs.batch_size)).measured(ROUNDS)
