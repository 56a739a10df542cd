"""How arguments are read: parsers whose errors are one line that helps, and the kinds of numbers that options take."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """Arguments that argparse does not accept."""


class OneLineParser(argparse.ArgumentParser):
    """Reports errors as a UsageError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class CommandParser(OneLineParser):
    """The parser of one command. It refuses options that it does not know by itself, so that its own help is named."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


class HelpWithExamples(argparse.HelpFormatter):
    """Fills paragraphs as usual, but leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def add_command(commands: Any, name: str, *, help: str, description: str, examples: Sequence[str]) -> CommandParser:
    """The parser of a new command. ``examples`` are whole command lines, which its help ends with."""
    parser: CommandParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=HelpWithExamples,
    )
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


def amount(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def positive_amount(text: str) -> float:
    """A finite number above 0."""
    number = amount(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def gflops_target(text: str) -> float | str:
    """GFLOPs, or a share of the uncompressed model's such as "60%", which stays text until the model is known."""
    try:
        if not text.endswith("%"):
            return amount(text)
        share = amount(text[:-1])
    except argparse.ArgumentTypeError:
        share = math.nan
    if not 0 < share <= 100:
        raise argparse.ArgumentTypeError(f"expected GFLOPs, or a share of the model's up to 100%, got {text!r}")
    return f"{share:g}%"


def method_text(text: str) -> str:
    """A method as ``compress(method=...)`` takes it, in its own words."""
    from ..errors import InputError
    from ..methods import method_of

    try:
        return str(method_of(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
