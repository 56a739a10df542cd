"""Writes the tables of options in docs/command_line.md: ``python scripts/write_option_tables.py``.

They come from the parser and stand between ``<!-- options of NAME -->`` and ``<!-- end of options -->``; all else is
written by hand. ``python_tests/docs/test_reference_pages.py`` fails when a table is out of date.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from diffrate_ext.cli.main import build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs/command_line.md"
_TABLE = re.compile(r"(<!-- options of (\S+) -->\n)(.*?)(<!-- end of options -->)", re.DOTALL)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand, by its name."""
    (choices,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(choices.choices)


def option_table(parser: argparse.ArgumentParser) -> str:
    """Every option of a command, in the order of its ``--help``."""
    rows = ["| option | |", "|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
            rows.append(f"| {invocation(action)} | {_cell(meaning)} |")
    return "\n".join(["", *rows, "", ""])  # Markdown wants empty lines around a table


def invocation(action: argparse.Action) -> str:
    """How an option is given: its names, and what follows them."""
    *others, last = action.option_strings or [str(action.metavar or action.dest)]
    value = ""
    if action.option_strings and action.nargs != 0:
        choices = action.choices and "{" + ",".join(map(str, action.choices)) + "}"
        value = f" {choices or action.metavar or action.dest.upper()}" + (" ..." if action.nargs == "+" else "")
    return ", ".join(f"`{name}`" for name in [*others, last + value])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def with_tables(page: str) -> str:
    """The page with its tables written anew.

    Raises:
        KeyError: a table is of a command that does not exist.
    """
    parsers = commands()
    return _TABLE.sub(lambda table: table[1] + option_table(parsers[table[2]]) + table[4], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
