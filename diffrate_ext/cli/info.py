"""``diffrate info``."""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from typing import Any

from .common import consoles
from .parsing import add_command


def add_info_command(commands: Any) -> None:
    info = add_command(
        commands,
        "info",
        help="what was built, and what it runs on",
        description="Says which version this is, how its kernels were built, and which GPU torch sees.",
        examples=["diffrate info", "diffrate info --json"],
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    info.set_defaults(command=_info)


def version() -> str:
    try:
        return metadata.version("diffrate-ext")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _info(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    import diffrate_ext

    info: dict[str, Any] = {"version": version(), **diffrate_ext.build_info(), "GPU": _gpus()}
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return
    table = Table(show_header=False)
    info["cuda_architectures"] = info["cuda_architectures"] or "none: built without CUDA kernels"
    for key, value in info.items():
        listed = isinstance(value, (list, tuple, set, frozenset))
        table.add_row(key.replace("_", " "), (", ".join(map(str, value)) or "none") if listed else str(value))
    consoles()[0].print(table)


def _gpus() -> list[str]:
    """Those that torch can use."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
