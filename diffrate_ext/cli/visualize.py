"""``diffrate visualize``."""

from __future__ import annotations

import argparse
from typing import Any

from .common import (
    add_machine_options,
    add_model_options,
    add_picture_output,
    add_schedule_options,
    consoles,
    device_named,
    schedules_named,
)
from .parsing import add_command, positive
from .workload import add_picture_options, workload_named

PICTURES = 4


def add_visualize_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "visualize",
        help="a picture of what happens to the tokens",
        description="Draws which tokens are pruned and which are merged into which, and what the model says before and "
        "after. Of several schedules it draws the one nearest to two thirds of the model's FLOPs.",
        examples=[
            "diffrate visualize",
            "diffrate visualize --model deit_small_patch16_224 --images cat.jpg --gflops 60% --blocks 1 4 8 12",
        ],
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
    add_machine_options(parser)
    add_picture_output(parser, "diffrate_tokens.png")
    parser.set_defaults(command=_visualize)


def _visualize(arguments: argparse.Namespace) -> None:
    from ..demo import draw
    from ..visualization import check_output

    output = check_output(arguments.output)
    device = device_named(arguments)
    results, remarks = consoles()
    n_images = arguments.n_images or PICTURES
    workload = workload_named(arguments, n_images, 40, remarks)
    workload.model.to(device)
    schedules = schedules_named(arguments, workload.model)
    draw(workload, schedules, output, n_images=n_images, blocks=arguments.blocks, paint=arguments.paint)
    results.print(f"Picture: {output}", soft_wrap=True, markup=False)
