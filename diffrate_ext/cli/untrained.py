"""Models with random weights, for the commands that measure nothing but speed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import add_no_pretrained_option, device_named

if TYPE_CHECKING:
    from torch import nn


def add_untrained_options(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--no-pretrained`` and ``--dtype``."""
    parser.add_argument("--model", metavar="NAME", help="a model of timm or transformers (default: the embedded one)")
    add_no_pretrained_option(parser, "random weights, as always here")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(default: float32)"
    )


def untrained_named(arguments: argparse.Namespace, image_size: int | None = None) -> nn.Module:
    """The model that the arguments name, on their device and in their dtype; by default the embedded one, for which
    no image size can be chosen."""
    import torch

    from .. import embedded
    from ..model_loading import untrained_model

    model = embedded.build_model() if arguments.model is None else untrained_model(arguments.model, image_size)
    return model.to(device_named(arguments), getattr(torch, arguments.dtype)).eval()
