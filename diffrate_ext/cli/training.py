"""Options of the commands that train: their steps, their images, and how these are shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_machine_options, default_workers
from .parsing import amount, not_negative, positive

if TYPE_CHECKING:
    from ..images.sources import ImageSource
    from ..training.processes import Processes

MIXUP, CUTMIX, SMOOTHING = 0.8, 1.0, 0.1


def add_image_folder_options(parser: argparse.ArgumentParser, unlabelled: str) -> None:
    """``--images`` and ``--split``; ``unlabelled`` is the option with which pictures need no labels."""
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help=f"class sub-folders of pictures, a saved Hugging Face dataset, or, with {unlabelled}, any pictures",
    )
    parser.add_argument("--split", metavar="NAME", help="the part of the images (default: train, or the only one)")


def add_output_options(parser: argparse.ArgumentParser, folder: str, holds: str, run: str) -> None:
    """``--output`` and ``--resume``; ``holds`` is what the folder is for, ``run`` what can be continued."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(folder),
        metavar="FOLDER",
        help=f"for {holds} and checkpoint (default: {folder})",
    )
    parser.add_argument("--resume", action="store_true", help=f"continue the {run} in the output folder")


def add_batch_options(training: argparse._ArgumentGroup, steps: int, of_ours: int) -> None:
    """``--steps``, by default so many, and ``--batch-size``."""
    training.add_argument(
        "--steps", type=positive, metavar="N", help=f"batches (default: {steps}; embedded: {of_ours})"
    )
    training.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="images in a batch of each process (default: 64)"
    )


def add_run_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """``--device``, ``--threads`` and ``--seed``, in a group that is returned."""
    run = parser.add_argument_group("run")
    add_machine_options(run)
    run.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of all random choices (default: 0)")
    return run


def add_data_options(parser: argparse.ArgumentParser, smoothing: str) -> None:
    """How images are shown; ``smoothing`` is the help of ``--label-smoothing``."""
    data = parser.add_argument_group("images")
    data.add_argument(
        "--mixup", type=amount, metavar="A", help=f"strength of mixup (default: {MIXUP}; embedded: 0, off)"
    )
    data.add_argument(
        "--cutmix", type=amount, metavar="A", help=f"strength of cutmix (default: {CUTMIX:g}; embedded: 0, off)"
    )
    data.add_argument("--label-smoothing", type=amount, metavar="S", help=smoothing)
    data.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random crops, colours and erasing, as DeiT; else show the images as an evaluation does (default: yes; "
        "embedded: no)",
    )
    data.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="processes that read images (default: up to 4; embedded: 0)",
    )


def choose(arguments: argparse.Namespace, name: str, default: Any, of_ours: Any) -> Any:
    """An option's value, or its default: the embedded model has its own."""
    value = getattr(arguments, name)
    return value if value is not None else of_ours if arguments.model is None else default


def loading_named(arguments: argparse.Namespace, smoothing: float) -> dict[str, Any]:
    """How ``training_loader`` is to show the images."""
    return {
        "batch_size": arguments.batch_size,
        "augment": choose(arguments, "augment", True, False),
        "mixup": choose(arguments, "mixup", MIXUP, 0.0),
        "cutmix": choose(arguments, "cutmix", CUTMIX, 0.0),
        "smoothing": smoothing,
        "workers": choose(arguments, "workers", default_workers(), 0),
    }


def data_fingerprint(images: ImageSource, loading: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """What a resumed run must have in common with the one before, of its images."""
    facts = {name: value for name, value in loading.items() if name not in ("batch_size", "workers")}
    return {
        **facts,
        "images": images.where,
        "number of images": len(images),
        "global batch size": loading["batch_size"] * processes.world,
    }
