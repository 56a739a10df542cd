"""``diffrate benchmark``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_machine_options,
    add_rounds_option,
    add_schedule_options,
    consoles,
    device_named,
    say_if_busy,
    schedules_named,
)
from .parsing import UsageError, add_command, positive
from .untrained import add_untrained_options, untrained_named

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ..compression.choice import NamedSchedule
    from ..speed import NotRun, Speed

BATCH_SIZES = {"cpu": [1, 4, 16], "cuda": [1, 8, 32, 128]}
WAYS = {"cpu": ["eager"], "cuda": ["eager", "graph"]}


def add_benchmark_command(commands: Any) -> None:
    benchmark = add_command(
        commands,
        "benchmark",
        help="does compression pay on this machine, and from which batch size on",
        description="Times the uncompressed and the compressed model in turn, at several batch sizes and in the ways "
        "that you may run them, and says from where on compression pays. Images and weights are random, neither of "
        "which changes the speed: nothing is downloaded.",
        examples=[
            "diffrate benchmark --model deit_small_patch16_224",
            "diffrate benchmark --model vit_base_patch16_224 --gflops 60% --batch-size 1 8 64 --run eager compiled "
            "graph --device cuda --dtype bfloat16 --plot speed.png",
            "diffrate benchmark --model vit_small_patch14_dinov2 --gflops 60% --batch-size 4 --image-size 112 224 448",
        ],
    )
    add_untrained_options(benchmark)
    add_schedule_options(benchmark)
    benchmark.add_argument(
        "--batch-size",
        type=positive,
        nargs="+",
        metavar="N",
        help="images in a batch (default: 1 4 16; on a GPU 1 8 32 128)",
    )
    benchmark.add_argument(
        "--image-size",
        type=positive,
        nargs="+",
        metavar="N",
        help="sides of square images in pixels, for each of which the model is built (default: its own size)",
    )
    benchmark.add_argument(
        "--run",
        choices=("eager", "compiled", "graph"),
        nargs="+",
        help="how all models are run: as they are, by torch.compile, as CUDA graphs (default: "
        "eager; on a GPU eager graph)",
    )
    add_rounds_option(benchmark, 10)
    add_machine_options(benchmark)
    benchmark.add_argument("--json", action="store_true", help="print JSON instead of tables")
    benchmark.add_argument("--plot", type=Path, metavar="FILE", help="draw the speeds, too")
    benchmark.set_defaults(command=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> None:
    from rich.progress import Progress

    from ..speed import measure_speed
    from ..visualization import check_output

    plot = None if arguments.plot is None else check_output(arguments.plot)
    results, remarks = consoles()
    device = device_named(arguments)
    batch_sizes = sorted(set(arguments.batch_size or BATCH_SIZES.get(device.type, BATCH_SIZES["cpu"])))
    ways = list(dict.fromkeys(arguments.run or WAYS.get(device.type, WAYS["cpu"])))
    sizes = sorted(set(arguments.image_size)) if arguments.image_size else [None]
    cases = [_case(arguments, size) for size in sizes]
    say_if_busy(remarks)
    speeds: list[Speed] = []
    not_run: list[NotRun] = []
    with Progress(console=remarks) as progress:
        total = len(cases) * len(batch_sizes) * len(ways) * arguments.rounds
        task = progress.add_task("timing, interleaved", total=total)
        for model, schedules in cases:
            measured, missing = measure_speed(
                model,
                schedules,
                batch_sizes=batch_sizes,
                ways=ways,
                rounds=arguments.rounds,
                on_progress=lambda: progress.advance(task),
            )
            speeds += measured
            not_run += missing
    if not speeds:
        raise UsageError(f"nothing could be run: {not_run[0].reason}")
    if arguments.json:
        print(json.dumps(_record(arguments, speeds, not_run), indent=2))
    else:
        results.print(_table(arguments, speeds))
        for line in _verdicts(speeds, not_run):
            results.print(line, soft_wrap=True, markup=False)
    if plot is not None:
        from ..machine import processor
        from ..speed_plot import draw_speeds

        draw_speeds(speeds, f"{_name(arguments)}, {arguments.dtype}\n{processor(device)}").savefig(plot, dpi=110)
        remarks.print(f"Plot: {plot}", soft_wrap=True, markup=False)


def _case(arguments: argparse.Namespace, image_size: int | None) -> tuple[nn.Module, list[NamedSchedule]]:
    """The model for images of one size, and its schedules."""
    from ..compression.copies import compressed_copy
    from ..errors import InputError

    if arguments.model is None and image_size is not None:
        raise UsageError("--image-size needs --model NAME: the embedded model takes 28 x 28 pixels")
    try:
        model = untrained_named(arguments, image_size)
        schedules = _schedules(arguments, model)
        for named in schedules:  # what does not fit is refused before anything is timed
            compressed_copy(model, named.schedule)
        return model, schedules
    except InputError as error:
        if image_size is None:
            raise
        raise UsageError(f"--image-size {image_size}: {error}") from error


def _schedules(arguments: argparse.Namespace, model: nn.Module) -> list[NamedSchedule]:
    from ..demo import uniform_schedules

    if arguments.image_size and not (arguments.gflops or arguments.schedule):
        return uniform_schedules(model, arguments.method or "diffrate")  # published ones are for one size
    return schedules_named(arguments, model)


def _name(arguments: argparse.Namespace) -> str:
    return arguments.model or "embedded ViT"


def _record(arguments: argparse.Namespace, speeds: list[Speed], not_run: list[NotRun]) -> dict[str, Any]:
    import torch

    from ..machine import processor
    from ..speed import best_of, break_evens

    return {
        "model": _name(arguments),
        "device": arguments.device,
        "processor": processor(torch.device(arguments.device)),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "speeds": [
            {
                "schedule": one.name,
                "method": one.method,
                "run": one.way,
                "tokens": one.tokens,
                "batch_size": one.measured.batch_size,
                "gflops": one.measured.gflops,
                "uncompressed_gflops": one.measured.uncompressed_gflops,
                "images_per_second": one.measured.images_per_second,
                "uncompressed_images_per_second": one.measured.uncompressed_images_per_second,
                "speed_up": one.measured.speed_up,
                "speed_up_quartiles": one.measured.speed_up_quartiles,
                "flops_ratio": one.measured.flops_ratio,
                "realised_gain": one.measured.realised_gain,
            }
            for one in speeds
        ],
        "break_even": [
            {
                "schedule": one.name,
                "run": one.way,
                ("batch_size" if one.axis == "tokens" else "tokens"): one.where,
                "along": one.axis,
                "pays_from": one.begins_at,
                "faster_at": one.faster,
                "slower_at": one.slower,
                "verdict": one.words,
            }
            for one in break_evens(speeds)
        ],
        "fastest": [
            {
                "tokens": one.tokens,
                "batch_size": one.batch_size,
                "uncompressed_run": one.uncompressed_way,
                "schedule": one.compressed.name,
                "run": one.compressed.way,
                "speed_up": one.speed_up,
            }
            for one in best_of(speeds)
        ],
        "not_run": [
            {"run": one.way, "tokens": one.tokens, "batch_size": one.batch_size, "reason": one.reason}
            for one in not_run
        ],
    }


def _table(arguments: argparse.Namespace, speeds: list[Speed]) -> Table:
    from itertools import groupby

    from rich.table import Table

    from ..demo import add_names_column
    from ..machine import place

    table = Table(
        title=f"{_name(arguments)}, {arguments.dtype}, {place(arguments.device)}",
        caption=f"medians of {arguments.rounds} interleaved rounds, with quartiles\n"
        "speed-up: over uncompressed, run alike; gain: speed-up / FLOPs ratio",
    )
    add_names_column(table)
    for heading in ("GFLOPs", "images/s", "speed-up", "FLOPs ratio", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    several = len({speed.tokens for speed in speeds}) > 1
    for (tokens, batch, way), group in groupby(
        speeds, lambda speed: (speed.tokens, speed.measured.batch_size, speed.way)
    ):
        rows = list(group)
        first = rows[0].measured
        where = f"{tokens} tokens, batch {batch}, {way}" if several else f"batch {batch}, {way}"
        table.add_row(where, style="bold")
        rate = f"{first.uncompressed_images_per_second:.4g}"
        table.add_row("uncompressed", f"{first.uncompressed_gflops:.3g}", rate, "1.00x", "1.00x", "")
        for one in rows:
            speed = one.measured
            low, high = speed.speed_up_quartiles
            table.add_row(
                one.name,
                f"{speed.gflops:.3g}",
                f"{speed.images_per_second:.4g}",
                f"{speed.speed_up:.2f}x ({low:.2f}-{high:.2f})",
                f"{speed.flops_ratio:.2f}x",
                f"{speed.realised_gain:.2f}",
            )
        table.add_section()
    return table


def _verdicts(speeds: list[Speed], not_run: list[NotRun]) -> list[str]:
    """From where on compression pays, and what is fastest."""
    from ..speed import best_of, break_evens

    several = len({one.tokens for one in speeds}) > 1
    lines = []
    for one in break_evens(speeds):
        where = f" with {one.where} tokens" if several and one.axis == "batch size" else ""
        lines.append(f"{one.name}, {one.way}{where}: {one.words}")
    if len({one.way for one in speeds}) > 1:
        for best in best_of(speeds):
            where = f"{best.tokens} tokens, " if several else ""
            lines.append(
                f"At {where}batch size {best.batch_size} the fastest compressed model ({best.compressed.name}, "
                f"{best.compressed.way}) is {best.speed_up:.2f}x as fast as the fastest uncompressed one "
                f"({best.uncompressed_way})"
            )
    for missing in not_run:
        lines.append(
            f"Not run: {missing.way}, {missing.tokens} tokens, batch size {missing.batch_size}: {missing.reason}"
        )
    return lines
