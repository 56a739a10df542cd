"""``diffrate visualize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_model_options, add_schedule_options, consoles, device_named, positive, schedules_named
from .workload import add_picture_options, workload_named

PICTURES = 4


def add_visualize_command(commands: Any) -> None:
    parser = commands.add_parser(
        "visualize",
        help="a picture of what happens to the tokens",
        description="Draws which tokens are pruned and which are merged into which, and what the model says before and "
        "after. Of several schedules it draws the one nearest to two thirds of the model's FLOPs.",
    )
    add_model_options(parser)
    add_picture_options(parser, f"default: {PICTURES}")
    add_schedule_options(parser)
    parser.add_argument(
        "--blocks",
        type=positive,
        nargs="+",
        metavar="N",
        help="after which blocks to draw, e.g. 1 4 8 12 (default: four, evenly spread)",
    )
    parser.add_argument(
        "--paint",
        choices=("mean", "hue"),
        default="mean",
        help="merged tokens in the mean colour of their pixels, or in a hue of their own (default: mean)",
    )
    parser.add_argument("--device", default="cpu", help="where to run, e.g. cuda (default: cpu)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("diffrate_tokens.png"),
        metavar="FILE",
        help="the picture (default: diffrate_tokens.png)",
    )
    parser.set_defaults(command=_visualize)


def _visualize(arguments: argparse.Namespace) -> None:
    from ..demo import draw
    from ..visualization import check_output

    output = check_output(arguments.output)
    device = device_named(arguments.device)
    results, remarks = consoles()
    n_images = arguments.n_images or PICTURES
    workload = workload_named(arguments, n_images, 40, remarks)
    workload.model.to(device)
    schedules = schedules_named(arguments, workload.model)
    draw(workload, schedules, output, n_images=n_images, blocks=arguments.blocks, paint=arguments.paint)
    results.print(f"Picture: {output}", soft_wrap=True, markup=False)
