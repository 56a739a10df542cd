"""The model and the pictures that a command is to run on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import check_embedded_options, model_named
from .parsing import UsageError, positive

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo import Workload

PICTURES_BY_DEFAULT = 64
"""Of the user's own; large models take seconds for each on a CPU."""


def add_picture_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--images", type=Path, metavar="PATH", help="a picture, or a folder of pictures (with sub-folders)"
    )
    parser.add_argument("--n-images", type=positive, metavar="N", help=f"how many images ({default})")


def workload_named(
    arguments: argparse.Namespace, pictures: int, embedded_images: int | None, remarks: Console
) -> Workload:
    """The model and the images that the arguments name; at most ``pictures`` of the user's own by default."""
    from ..demo import Workload, embedded_workload

    check_embedded_options(arguments)
    if arguments.model is None:
        return embedded_workload(arguments.n_images or embedded_images, arguments.weights)
    if arguments.images is None:
        raise UsageError("--model needs --images PATH, a picture or a folder of pictures")

    from ..images.loading import transform_for
    from ..images.pictures import find_pictures, load_pictures, spread

    found = find_pictures(arguments.images)
    chosen = spread(found, arguments.n_images or pictures)
    model = model_named(arguments)
    loaded = load_pictures(chosen, transform_for(model, augment=False))
    for path, reason in loaded.skipped:
        remarks.print(f"skipped {path}: {reason}", style="yellow", markup=False, soft_wrap=True)
    if len(chosen) < len(found):
        remarks.print(f"{len(chosen)} of {len(found)} pictures, evenly spread (--n-images takes more or fewer)")
    titles = [path.name if len(path.name) <= 20 else f"{path.name[:19]}…" for path in loaded.paths]
    name = f"{arguments.model} (random weights)" if arguments.no_pretrained else arguments.model
    return Workload(name, model, loaded.images, titles)
