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
from .parsing import add_command
from .workload import add_picture_options, workload_named


def add_visualize_command(commands: Any) -> None:
    visualize = add_command(
        commands,
        "visualize",
        help="a picture of what happens to the tokens",
        description="Draws which tokens are pruned and which are merged into which, by the strongest of the schedules.",
        examples=[
            "diffrate visualize",
            "diffrate visualize --model deit_small_patch16_224 --images cat.jpg --gflops 60%",
        ],
    )
    add_model_options(visualize)
    add_picture_options(visualize, "default: 4")
    add_schedule_options(visualize)
    add_machine_options(visualize)
    add_picture_output(visualize, "diffrate_tokens.png")
    visualize.set_defaults(command=_visualize)


def _visualize(arguments: argparse.Namespace) -> None:
    from ..demo import draw
    from ..visualization import check_output

    output = check_output(arguments.output)
    results, remarks = consoles()
    n_images = arguments.n_images or 4
    workload = workload_named(arguments, n_images, 40, remarks)
    workload.model.to(device_named(arguments))
    draw(workload, schedules_named(arguments, workload.model), output, n_images=n_images)
    results.print(f"Picture: {output}", soft_wrap=True, markup=False)
