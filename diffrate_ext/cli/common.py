"""What the commands of the command line share: options, the model, the device, the schedules."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .parsing import UsageError, gflops_target, method_text, positive

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from ..compression.choice import NamedSchedule


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a timm model, e.g. deit_small_patch16_224, or one of transformers, e.g. "
        "transformers:google/vit-base-patch16-224 (default: the embedded one)",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", type=Path, metavar="FILE", help="local checkpoint (.safetensors, .pth) instead of a download"
    )
    add_no_pretrained_option(weights)
    parser.add_argument(
        "--num-classes", type=positive, metavar="N", help="of the head of --weights (default: as the model comes)"
    )


def add_no_pretrained_option(
    parser: argparse._ActionsContainer, help: str = "random weights: to try the speed without a download"
) -> None:
    parser.add_argument("--no-pretrained", action="store_true", help=help)


def add_machine_options(parser: argparse._ActionsContainer) -> None:
    """``--device`` and ``--threads``."""
    parser.add_argument("--device", default="cpu", help="where to run, e.g. cuda (default: cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: as torch chooses)")


def add_schedule_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gflops",
        type=gflops_target,
        nargs="+",
        metavar="G",
        help="uniform schedules of so many GFLOPs, or of a share of the model's such as 60%%",
    )
    parser.add_argument(
        "--schedule",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="schedules as a search leaves them, beside those of --gflops",
    )
    add_method_option(parser)
    add_any_model_option(parser)


def add_method_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        type=method_text,
        metavar="NAME",
        help="how tokens are removed: diffrate, tome, evit, dynamicvit or random, with options after a colon, as in "
        "tome:proportional_attention=false (default: as a --schedule says; else diffrate)",
    )


def add_any_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--any-model", action="store_true", help="use a --schedule although it says that it was made for another model"
    )


def add_timing_options(parser: argparse.ArgumentParser, *, batch_size: int, rounds: int) -> None:
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        metavar="N",
        help=f"images in a batch (default: {batch_size})",
    )
    add_rounds_option(parser, rounds)
    add_machine_options(parser)


def add_rounds_option(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--rounds", type=positive, default=rounds, metavar="N", help=f"rounds of timing (default: {rounds})"
    )


def add_picture_output(parser: argparse.ArgumentParser, name: str, what: str = "the picture") -> None:
    parser.add_argument("--output", type=Path, default=Path(name), metavar="FILE", help=f"{what} (default: {name})")


def consoles(*, quiet: bool = False) -> tuple[Console, Console]:
    """For results, on stdout, and for progress and remarks, on stderr."""
    from rich.console import Console

    return Console(highlight=False, quiet=quiet), Console(stderr=True, highlight=False, quiet=quiet)


@contextmanager
def warnings_on(console: Console) -> Iterator[None]:
    """Within a ``with`` block, warnings, as of pictures that cannot be read, are remarks of one line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: console.print(
            str(message), style="yellow", markup=False, soft_wrap=True
        )
        yield


def say_if_busy(console: Console) -> None:
    """For commands that measure speed, before they start to work."""
    from ..machine import busy_machine

    remark = busy_machine()
    if remark is not None:
        console.print(remark, style="yellow", soft_wrap=True, markup=False)


def default_workers() -> int:
    """Processes that read the user's pictures."""
    return min(4, os.cpu_count() or 1)


def model_named(arguments: argparse.Namespace) -> nn.Module:
    """The model that the arguments name, with its weights; by default the embedded one."""
    from .. import embedded
    from ..model_loading import load_model

    if arguments.model is None:
        return embedded.load_model(arguments.weights)
    return load_model(
        arguments.model,
        pretrained=not arguments.no_pretrained,
        weights=arguments.weights,
        num_classes=arguments.num_classes,
    )


def device_named(arguments: argparse.Namespace) -> torch.device:
    """The ``--device``. From here on torch uses as many ``--threads``."""
    import torch

    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        raise UsageError(f"--device: no such device: {arguments.device!r}; expected e.g. cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: this torch sees no CUDA device")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return device


def check_embedded_options(arguments: argparse.Namespace) -> None:
    """Refuse what only makes sense beside --model when the embedded model is asked for."""
    if arguments.model is not None:
        return
    if arguments.images is not None:
        raise UsageError("--images needs --model NAME: the embedded model has images of its own")
    if arguments.num_classes is not None:
        raise UsageError("--num-classes needs --model NAME: the embedded model has 10 classes")
    if arguments.no_pretrained:
        raise UsageError("--no-pretrained needs --model NAME: the embedded model has weights of its own")


def schedules_named(arguments: argparse.Namespace, model: nn.Module) -> list[NamedSchedule]:
    """What the arguments ask for; else the published schedules of this model, else the default targets.

    Each says the method that it is for. One that is not DiffRate is part of its name.
    """
    from ..compression.choice import named_uniform
    from ..demo import published_schedules, uniform_schedules

    method = arguments.method or "diffrate"
    given = schedules_in(list(dict.fromkeys(arguments.schedule or [])), model, any_model=arguments.any_model)
    named = [with_method(one, arguments.method or one.schedule.method) for one in given]
    named += [named_uniform(model, gflops, method) for gflops in dict.fromkeys(arguments.gflops or [])]
    if named:
        return named
    published = published_schedules(arguments.model or "") if method == "diffrate" else []
    return published or uniform_schedules(model, method)


def schedules_in(paths: Sequence[Path], model: nn.Module, *, any_model: bool) -> list[NamedSchedule]:
    """Schedules from files; unless for ``any_model``, they must not say that they were made for another one."""
    from ..compression.choice import NamedSchedule
    from ..compression.compress import check_made_for
    from ..schedule import Schedule

    named = [NamedSchedule(_name_of(path), Schedule.load(path)) for path in paths]
    for one in named if not any_model else []:
        check_made_for(model, one.schedule)
    return named


def with_method(named: NamedSchedule, method: str) -> NamedSchedule:
    """A schedule as another method's, which is part of its name unless it is DiffRate."""
    name = named.name if method == "diffrate" else f"{method} {named.name}"
    return replace(named, name=name, schedule=replace(named.schedule, method=method))


def _name_of(path: Path) -> str:
    """What a search leaves is called schedule.json: its folder tells it from others."""
    return path.resolve().parent.name if path.name == "schedule.json" else path.name
