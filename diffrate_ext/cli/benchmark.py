"""``diffrate benchmark``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .common import (
    add_no_pretrained_option,
    add_schedule_options,
    add_timing_options,
    consoles,
    device_named,
    say_if_busy,
    schedules_named,
)
from .parsing import add_command

if TYPE_CHECKING:
    from rich.table import Table

    from ..compression.choice import NamedSchedule
    from ..timing import Benchmark


def add_benchmark_command(commands: Any) -> None:
    benchmark = add_command(
        commands,
        "benchmark",
        help="speed of a model on this machine, with and without compression",
        description="Times the uncompressed and the compressed model in turn, on random images and with random "
        "weights, neither of which changes the speed: nothing is downloaded.",
        examples=[
            "diffrate benchmark --model deit_small_patch16_224",
            "diffrate benchmark --model vit_base_patch16_224 --gflops 80% 60% --device cuda --dtype bfloat16",
        ],
    )
    benchmark.add_argument(
        "--model", metavar="NAME", help="a model of timm or transformers (default: the embedded one)"
    )
    add_no_pretrained_option(benchmark, "random weights, as always here")
    add_schedule_options(benchmark)
    add_timing_options(benchmark, batch_size=16, rounds=10)
    benchmark.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(default: float32)"
    )
    benchmark.add_argument("--json", action="store_true", help="print JSON instead of a table")
    benchmark.set_defaults(command=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> None:
    import torch
    from rich.progress import Progress

    from .. import embedded
    from ..model_loading import load_model
    from ..timing import Comparison, random_images

    results, remarks = consoles()
    model = load_model(arguments.model, pretrained=False) if arguments.model else embedded.build_model()
    model.to(device_named(arguments), getattr(torch, arguments.dtype)).eval()
    schedules = schedules_named(arguments, model)
    comparison = Comparison(model, [named.schedule for named in schedules], random_images(model, arguments.batch_size))
    say_if_busy(remarks)
    with Progress(console=remarks) as progress:
        task = progress.add_task("timing, interleaved", total=arguments.rounds)
        for done in comparison.run(arguments.rounds):
            progress.update(task, completed=done)
    measured = comparison.results()
    name = arguments.model or "embedded ViT"
    if arguments.json:
        setting = {
            "model": name,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
        }
        rows = zip(schedules, measured, strict=True)
        print(json.dumps([{**setting, **_record(named, speed)} for named, speed in rows], indent=2))
    else:
        results.print(_table(name, arguments, schedules, measured))


def _record(named: NamedSchedule, speed: Benchmark) -> dict[str, Any]:
    return {
        "schedule": named.name,
        "method": named.schedule.method,
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


def _table(
    name: str, arguments: argparse.Namespace, schedules: list[NamedSchedule], measured: list[Benchmark]
) -> Table:
    from rich.table import Table

    from ..demo import add_names_column
    from ..machine import place

    table = Table(
        title=f"{name}, batches of {arguments.batch_size}, {arguments.dtype}, {place(arguments.device)}",
        caption=f"medians of {arguments.rounds} interleaved rounds; gain: speed-up / FLOPs ratio",
    )
    add_names_column(table)
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
    return table
