"""``diffrate demo``."""

from __future__ import annotations

import argparse
from typing import Any

from ..embedded import SEARCH_STEPS
from .common import (
    add_model_options,
    add_picture_output,
    add_schedule_options,
    add_timing_options,
    consoles,
    device_named,
    say_if_busy,
    schedules_named,
)
from .parsing import add_command, positive
from .workload import PICTURES_BY_DEFAULT, add_picture_options, workload_named

QUICK_STEPS, QUICK_IMAGES = 15, 200


def add_demo_command(commands: Any) -> None:
    demo = add_command(
        commands,
        "demo",
        help="accuracy and speed of a model with and without compression, and a picture",
        description="Without arguments: learns how many tokens each layer of the embedded Vision Transformer keeps, "
        "on embedded Fashion-MNIST training images, and compares that with a uniform schedule on test images. With "
        "--model and --images: any supported model on your pictures, under published or uniform schedules.",
        examples=[
            "diffrate demo --quick",
            "diffrate demo",
            "diffrate demo --model deit_small_patch16_224 --images photos/",
        ],
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help=f"about a minute: {QUICK_STEPS} steps of learning, {QUICK_IMAGES} images",
    )
    add_model_options(demo)
    add_picture_options(demo, f"default: all 2,000 embedded ones; {PICTURES_BY_DEFAULT} of yours, evenly spread")
    add_schedule_options(demo)
    demo.add_argument(
        "--search-steps",
        type=positive,
        metavar="N",
        help=f"batches to learn from, without other arguments (default: {SEARCH_STEPS})",
    )
    add_timing_options(demo, batch_size=32, rounds=12)
    add_picture_output(demo, "diffrate_demo.png")
    demo.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from ..demo import draw, learned_schedule, measure, results_table
    from ..visualization import check_output

    output = check_output(arguments.output)
    results, remarks = consoles()
    workload = workload_named(arguments, PICTURES_BY_DEFAULT, QUICK_IMAGES if arguments.quick else None, remarks)
    workload.model.to(device_named(arguments))
    of_ours = not (arguments.model or arguments.weights or arguments.method)
    learned = None
    if of_ours and not arguments.gflops and not arguments.schedule:
        say_if_busy(remarks)
        steps = arguments.search_steps or (QUICK_STEPS if arguments.quick else SEARCH_STEPS)
        schedules = learned_schedule(workload, steps, remarks)
        learned = output.with_suffix(".json")
        schedules[-1].schedule.save(learned)
    else:
        schedules = schedules_named(arguments, workload.model)
        say_if_busy(remarks)
    if arguments.no_pretrained:
        remarks.print("Random weights: the speed is real, the agreement says nothing about the trained model.")
    result = measure(workload, schedules, batch_size=arguments.batch_size, rounds=arguments.rounds, console=remarks)
    results.print(results_table(workload, schedules, result))
    draw(workload, schedules, output)
    results.print(f"Picture: {output}", soft_wrap=True, markup=False)
    if learned is not None:
        results.print(f"Learned schedule: {learned}", soft_wrap=True, markup=False)
