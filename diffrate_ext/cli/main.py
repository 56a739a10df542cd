"""The command line: ``diffrate``, with a command of its own for each thing to do.

Nothing heavy is imported until a command runs, so that ``--help`` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..embedded import SEARCH_STEPS
from ..errors import InputError
from .common import (
    OneLineParser,
    UsageError,
    add_model_options,
    add_schedule_options,
    add_timing_options,
    consoles,
    device_named,
    positive,
    schedules_named,
    warnings_on,
)
from .compare import add_compare_command
from .evaluate import add_evaluate_command
from .finetune import add_finetune_command
from .search import add_search_command
from .train_predictors import add_train_predictors_command
from .visualize import add_visualize_command
from .workload import PICTURES_BY_DEFAULT, add_picture_options, workload_named


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 after one line on stderr that says what is wrong.

    What the caller can mend gets one line; everything else is a fault of ours, and gets its traceback.
    """
    try:
        arguments = build_parser().parse_args(argv)
        command: Callable[[argparse.Namespace], None] = arguments.command
        _, remarks = consoles()
        with warnings_on(remarks):
            command(arguments)
    except (UsageError, InputError, OSError) as error:
        return _fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return _fail("out of memory: try a smaller --batch-size")
    except KeyboardInterrupt as stop:
        if str(stop):  # training says how to continue it
            print(f"diffrate: {stop}", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"diffrate: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = OneLineParser(
        prog="diffrate", description="Fewer tokens for Vision Transformers: DiffRate token compression."
    )
    parser.add_argument("--version", action="version", version=f"diffrate_ext {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="accuracy and speed of a model with and without compression, and a picture",
        description="Without arguments: learns rates for the embedded Vision Transformer on embedded Fashion-MNIST "
        "training images, and compares them with uniform ones on test images. With --model and --images: any supported "
        "timm model on your pictures.",
    )
    add_model_options(demo)
    add_picture_options(demo, f"default: all 2,000 embedded ones; {PICTURES_BY_DEFAULT} of yours, evenly spread")
    add_schedule_options(demo)
    demo.add_argument(
        "--search-steps",
        type=positive,
        default=SEARCH_STEPS,
        metavar="N",
        help=f"batches to learn from, without other arguments (default: {SEARCH_STEPS})",
    )
    add_timing_options(demo, batch_size=32, rounds=12)
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("diffrate_demo.png"),
        metavar="FILE",
        help="the picture (default: diffrate_demo.png)",
    )
    demo.set_defaults(command=_demo)

    add_search_command(commands)
    add_finetune_command(commands)
    add_evaluate_command(commands)
    add_compare_command(commands)
    add_train_predictors_command(commands)

    benchmark = commands.add_parser(
        "benchmark",
        help="speed of a model on this machine, with and without compression",
        description="Times the uncompressed and the compressed model in turn, on random images and with random "
        "weights, neither of which changes the speed: nothing is downloaded.",
    )
    benchmark.add_argument("--model", metavar="NAME", help="a timm model (default: the embedded one)")
    add_schedule_options(benchmark)
    add_timing_options(benchmark, batch_size=16, rounds=10)
    benchmark.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(default: float32)"
    )
    benchmark.add_argument("--json", action="store_true", help="print JSON instead of a table")
    benchmark.set_defaults(command=_benchmark)

    add_visualize_command(commands)

    info = commands.add_parser("info", help="what was built, and what it runs on")
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    info.set_defaults(command=_info)
    return parser


def _version() -> str:
    try:
        return metadata.version("diffrate-ext")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _demo(arguments: argparse.Namespace) -> None:
    from ..demo import draw, learned_schedule, measure, results_table
    from ..visualization import check_output

    output = check_output(arguments.output)
    results, remarks = consoles()
    workload = workload_named(arguments, PICTURES_BY_DEFAULT, None, remarks)
    workload.model.to(device_named(arguments.device))
    of_ours = not (arguments.model or arguments.weights or arguments.method)
    if of_ours and not arguments.gflops and not arguments.schedule:
        schedules = learned_schedule(workload, arguments.search_steps, remarks)
    else:
        schedules = schedules_named(arguments, workload.model)
    if arguments.no_pretrained:
        remarks.print("Random weights: the speed is real, the agreement says nothing about the trained model.")
    result = measure(workload, schedules, batch_size=arguments.batch_size, rounds=arguments.rounds, console=remarks)
    results.print(results_table(workload, schedules, result))
    draw(workload, schedules, output)
    results.print(f"Picture: {output}", soft_wrap=True, markup=False)


def _benchmark(arguments: argparse.Namespace) -> None:
    import torch
    from rich.progress import Progress
    from rich.table import Table

    from .. import embedded
    from ..model_loading import load_timm_model
    from ..timing import Comparison, random_images

    results, remarks = consoles()
    model = load_timm_model(arguments.model, pretrained=False) if arguments.model else embedded.build_model()
    model.to(device_named(arguments.device), getattr(torch, arguments.dtype)).eval()
    schedules = schedules_named(arguments, model)
    comparison = Comparison(model, [named.schedule for named in schedules], random_images(model, arguments.batch_size))
    with Progress(console=remarks) as progress:
        task = progress.add_task("timing, interleaved", total=arguments.rounds)
        for done in comparison.run(arguments.rounds):
            progress.update(task, completed=done)
    measured = comparison.results()
    name = arguments.model or "embedded ViT"
    if arguments.json:
        content = [
            {
                "model": name,
                "schedule": named.name,
                "method": named.schedule.method,
                "device": arguments.device,
                "dtype": arguments.dtype,
                "threads": torch.get_num_threads(),
                "batch_size": speed.batch_size,
                "rounds": speed.rounds,
                "gflops": speed.gflops,
                "uncompressed_gflops": speed.uncompressed_gflops,
                "images_per_second": speed.images_per_second,
                "uncompressed_images_per_second": speed.uncompressed_images_per_second,
                "speed_up": speed.speed_up,
                "speed_up_quartiles": speed.speed_up_quartiles,
                "flops_ratio": speed.flops_ratio,
                "realised_gain": speed.realised_gain,
            }
            for named, speed in zip(schedules, measured, strict=True)
        ]
        print(json.dumps(content, indent=2))
        return
    where = f"{torch.get_num_threads()} CPU threads" if arguments.device == "cpu" else arguments.device
    table = Table(
        title=f"{name}, batches of {arguments.batch_size}, {arguments.dtype}, {where}",
        caption=f"medians of {arguments.rounds} interleaved rounds; gain: speed-up / FLOPs ratio",
    )
    table.add_column("", no_wrap=True)
    for heading in ("GFLOPs", "images/s", "speed-up", "quartiles", "FLOPs ratio", "gain"):
        table.add_column(heading, justify="right")
    first = measured[0]
    table.add_row(
        "uncompressed",
        f"{first.uncompressed_gflops:.3g}",
        f"{first.uncompressed_images_per_second:.4g}",
        "1.00x",
        "",
        "1.00x",
        "",
    )
    for named, speed in zip(schedules, measured, strict=True):
        low, high = speed.speed_up_quartiles
        table.add_row(
            named.name,
            f"{speed.gflops:.3g}",
            f"{speed.images_per_second:.4g}",
            f"{speed.speed_up:.2f}x",
            f"{low:.2f}-{high:.2f}",
            f"{speed.flops_ratio:.2f}x",
            f"{speed.realised_gain:.2f}",
        )
    results.print(table)


def _info(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    import diffrate_ext

    info: dict[str, Any] = {"version": _version(), **diffrate_ext.build_info()}
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return
    table = Table(show_header=False)
    for key, value in info.items():
        listed = isinstance(value, (list, tuple, set, frozenset))
        table.add_row(key.replace("_", " "), (", ".join(map(str, value)) or "none") if listed else str(value))
    consoles()[0].print(table)
