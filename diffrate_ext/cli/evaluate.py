"""``diffrate evaluate``: accuracy, loss, cost and speed of schedules on a collection of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputValueError
from .common import (
    add_machine_options,
    add_model_options,
    add_rounds_option,
    add_schedule_options,
    check_embedded_options,
    consoles,
    default_workers,
    device_named,
    model_named,
    say_if_busy,
    schedules_named,
    warnings_on,
)
from .parsing import UsageError, add_command, not_negative, positive

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..evaluation import Batch
    from ..images.sources import ImageSource
    from ..timing import Benchmark

SPEED_ROUNDS = 8
"""By default."""


def add_evaluate_command(commands: Any) -> None:
    """Add ``evaluate`` to the commands of a parser."""
    parser = add_command(
        commands,
        "evaluate",
        help="accuracy, agreement, GFLOPs and speed of schedules on pictures",
        description="Compares a model under one or several schedules with the uncompressed one. Without arguments: the "
        "embedded model on the embedded test images, under uniform schedules. A model whose schedules the authors "
        "published is measured under those by default.",
        examples=[
            "diffrate evaluate",
            "diffrate evaluate --schedule found/schedule.json --gflops 60% --n-images 500",
            "diffrate evaluate --model deit_small_patch16_224 --images imagenet/",
        ],
    )
    add_model_options(parser)
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="class sub-folders of pictures, or a saved Hugging Face dataset; without labels: agreement only",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="the part of the images (default: val or test, or the only one)"
    )
    parser.add_argument("--n-images", type=positive, metavar="N", help="at most so many, evenly spread (default: all)")
    add_schedule_options(parser)
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images in a batch (default: 32)")
    parser.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="processes that read images (default: up to 4; embedded: 0)",
    )
    add_rounds_option(parser, SPEED_ROUNDS)
    add_machine_options(parser)
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..compression.copies import compressed_copy
    from ..evaluation import evaluate_all
    from ..images.loading import evaluation_loader
    from ..timing import Comparison

    check_embedded_options(arguments)
    if arguments.model is not None and arguments.images is None:
        raise UsageError("--model needs --images FOLDER to evaluate on")
    results, remarks = consoles()
    device = device_named(arguments)
    images, model = _images_and_model(arguments, remarks)
    model.to(device)
    schedules = schedules_named(arguments, model)
    workers = arguments.workers if arguments.workers is not None else default_workers() if arguments.model else 0
    loader = evaluation_loader(images, model, batch_size=arguments.batch_size, workers=workers)
    models = [model, *(compressed_copy(model, named.schedule) for named in schedules)]
    say_if_busy(remarks)
    first: list[torch.Tensor] = []  # the batch that is timed
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        warnings_on(remarks),
        Progress(*columns, console=remarks) as progress,
        torch.autocast(device.type, torch.bfloat16, enabled=arguments.amp),
    ):
        task = progress.add_task("evaluating, batches", total=len(loader))
        found = evaluate_all(models, progress.track(_keeping_first(loader, first), task_id=task))
        own = next(model.parameters())
        comparison = Comparison(model, [named.schedule for named in schedules], first[0].to(own.device, own.dtype))
        timing = progress.add_task("timing, interleaved", total=arguments.rounds)
        for done in comparison.run(arguments.rounds):
            progress.update(timing, completed=done)
    speed = comparison.results()
    name = arguments.model or "embedded ViT"
    content: list[dict[str, Any]] = []
    for i, result in enumerate(found):
        compressed = speed[i - 1] if i else None
        content.append(
            {
                "schedule": schedules[i - 1].name if i else "uncompressed",
                "method": schedules[i - 1].schedule.method if i else None,
                "gflops": compressed.gflops if compressed else speed[0].uncompressed_gflops,
                "top1": result.top1,
                "loss": result.loss,
                "agreement": result.agreement if i or result.cosine is not None else 1.0,
                "cosine": result.cosine,
                "images_per_second": compressed.images_per_second
                if compressed
                else speed[0].uncompressed_images_per_second,
                "speed_up": compressed.speed_up if compressed else 1.0,
                "speed_up_quartiles": compressed.speed_up_quartiles if compressed else None,
            }
        )
    setting = {
        "model": name,
        "images": images.where,
        "number_of_images": found[0].n,
        "device": arguments.device,
        "amp": arguments.amp,
        "threads": torch.get_num_threads(),
        "batch_size": len(first[0]),
        "rounds": speed[0].rounds,
    }
    if arguments.json:
        print(json.dumps({**setting, "results": content}, indent=2))
    else:
        results.print(_table(setting, content, speed))


def _images_and_model(arguments: argparse.Namespace, remarks: Console) -> tuple[ImageSource, nn.Module]:
    from ..answers import has_classes, number_of_classes
    from ..images.sources import match_classes, open_images, spread_over, without_labels

    images = open_images(arguments.images, split=arguments.split, purpose="evaluation")
    if arguments.n_images is not None:
        images = spread_over(images, arguments.n_images)
    model = model_named(arguments)
    if arguments.model is None or not images.labelled:
        return images, model
    if not has_classes(model):
        return without_labels(images), model
    try:
        return match_classes(images, number_of_classes(model)), model
    except InputValueError as error:
        remarks.print(f"agreement only: {error}", style="yellow", markup=False, soft_wrap=True)
        return without_labels(images), model


def _keeping_first(loader: Iterable[Batch], first: list[Any]) -> Iterator[Batch]:
    """The batches; the images of the first are put in the list ``first``."""
    for batch in loader:
        if not first:
            first.append(batch[0] if isinstance(batch, (tuple, list)) else batch)
        yield batch


def _table(setting: dict[str, Any], content: list[dict[str, Any]], speed: list[Benchmark]) -> Any:
    from rich.table import Table

    from ..demo import add_names_column, with_spread
    from ..machine import place

    features = content[0]["cosine"] is not None
    kept = "cosine: with the uncompressed features" if features else "agreement: same class as uncompressed"
    table = Table(
        title=f"{setting['model']} on {setting['number_of_images']:,} images of {setting['images']}",
        caption=f"{kept}; speed: medians of {setting['rounds']} interleaved rounds, "
        f"± half the distance between quartiles, batches of {setting['batch_size']}, {place(setting['device'])}",
        pad_edge=False,  # for terminals of 80 columns
    )
    add_names_column(table)
    for heading in ("GFLOPs", "top-1", "loss", "cosine" if features else "agree-\nment", "images\n/s", "speed-up"):
        table.add_column(heading, justify="right")
    speed_ups = ["1.00x", *map(with_spread, speed)]
    for row, speed_up in zip(content, speed_ups, strict=True):
        table.add_row(
            row["schedule"],
            f"{row['gflops']:.4g}",
            "-" if row["top1"] is None else f"{row['top1']:.2%}",
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            f"{row['cosine']:.4f}" if features else f"{row['agreement']:.2%}",
            f"{row['images_per_second']:.4g}",
            speed_up,
        )
    return table
