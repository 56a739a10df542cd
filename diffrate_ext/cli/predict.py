"""``diffrate predict``: one picture, before and after compression."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_any_model_option,
    add_machine_options,
    add_method_option,
    add_model_options,
    add_picture_output,
    consoles,
    device_named,
    schedules_in,
    with_method,
)
from .parsing import UsageError, add_command, gflops_target, positive
from .workload import workload_named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..compression.choice import NamedSchedule

SHARE = "60%"


def add_predict_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "predict",
        help="what a model says of one picture, before and after compression",
        description="Prints the most probable classes of a picture by the uncompressed and by the compressed model, "
        "and draws what happened to its tokens. Without --model: the embedded model on one of its test images.",
        examples=[
            "diffrate predict",
            "diffrate predict --model deit_small_patch16_224 --image cat.jpg",
            "diffrate predict --model deit_small_patch16_224 --image cat.jpg --schedule found/schedule.json",
        ],
    )
    add_model_options(parser)
    parser.add_argument("--image", type=Path, dest="images", metavar="FILE", help="the picture")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--gflops",
        type=gflops_target,
        default=SHARE,
        metavar="G",
        help="the cost, in GFLOPs or as a share of the model's: takes a published schedule where there is one for "
        f"these weights, else a uniform one (default: {SHARE.replace('%', '%%')})",
    )
    choice.add_argument("--schedule", type=Path, metavar="FILE", help="a schedule as a search leaves it")
    add_method_option(parser)
    add_any_model_option(parser)
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="how many classes (default: 5)")
    add_machine_options(parser)
    add_picture_output(parser, "diffrate_predict.png")
    parser.set_defaults(command=_predict, n_images=1)


def _predict(arguments: argparse.Namespace) -> None:
    import torch
    from rich.table import Table

    from ..answers import answer_of, has_classes
    from ..compression.copies import compressed_copy
    from ..compression.flops import flops
    from ..predictions import class_names_of
    from ..visualization import check_output, visualize

    output = check_output(arguments.output)
    if arguments.images is not None and arguments.images.is_dir():
        raise UsageError(f"--image: {arguments.images} is a folder; diffrate demo takes folders")
    if arguments.model is None and arguments.images is not None:
        raise UsageError("--image needs --model NAME: the embedded model has images of its own")
    if arguments.model is not None and arguments.images is None:
        raise UsageError("--model needs --image FILE")
    results, remarks = consoles()
    workload = workload_named(arguments, 1, 1, remarks)
    model = workload.model.to(device_named(arguments))
    if not has_classes(model):
        raise UsageError(f"{workload.name} has no classes to predict; diffrate visualize draws its tokens")
    named = _schedule_named(arguments, model)
    if arguments.no_pretrained:
        remarks.print("Random weights: the classes mean nothing.")
    images = workload.images.to(next(model.parameters()).device)
    compressed = compressed_copy(model, named.schedule)
    with torch.inference_mode():
        before, after = (answer_of(form(images)).float().softmax(1)[0].cpu() for form in (model, compressed))

    cost, before_cost = (flops(model, schedule) / 1e9 for schedule in (named.schedule, None))
    table = Table(title=f"{workload.name}, {workload.titles[0]}", caption=f"{cost:.3g} of {before_cost:.3g} GFLOPs")
    for heading in ("uncompressed", named.name):
        table.add_column(heading)
    names = class_names_of(model) or [f"class {i}" for i in range(len(before))]
    for row in zip(*(_most_probable(said, names, arguments.top) for said in (before, after)), strict=True):
        table.add_row(*row)
    results.print(table)
    visualize(model, images, named.schedule, titles=workload.titles, any_model=True).savefig(output, dpi=110)
    results.print(f"Picture: {output}", soft_wrap=True, markup=False)


def _schedule_named(arguments: argparse.Namespace, model: nn.Module) -> NamedSchedule:
    from ..compression.choice import schedule_for

    if arguments.schedule is None:
        return schedule_for(model, arguments.gflops, arguments.method or "diffrate")
    (given,) = schedules_in([arguments.schedule], model, any_model=arguments.any_model)
    return with_method(given, arguments.method or given.schedule.method)


def _most_probable(probabilities: Tensor, names: Sequence[str], n: int) -> list[str]:
    found = probabilities.topk(min(n, len(probabilities)))
    return [f"{share:6.1%}  {names[i]}" for share, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]
