"""Options of the commands that write one file of results, and the folder that it goes to."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from report import RESULTS


def parse(argv: Sequence[str] | None, description: str | None, *, quick: str) -> argparse.Namespace:
    """What was asked for. ``output`` is a folder: of a quick run a temporary one, unless another is named.

    Args:
        argv: arguments; None: those of the process.
        description: of the command.
        quick: what its quick form does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}; results in a temporary folder")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/diffrate_dinov2"), help="where the packages are kept")
    parser.add_argument("--resume", action="store_true", help="keep the records of an interrupted run and go on")
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    options = parser.parse_args(argv)
    if options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="diffrate_benchmarks_")) if options.quick else RESULTS
    return options
