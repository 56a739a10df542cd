"""The command line: ``diffrate``, with a command of its own for each thing to do.

Nothing heavy is imported until a command runs, so that ``--help`` and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence

from ..errors import InputError
from .benchmark import add_benchmark_command
from .common import consoles, warnings_on
from .compare import add_compare_command
from .demo import add_demo_command
from .evaluate import add_evaluate_command
from .finetune import add_finetune_command
from .info import add_info_command, version
from .parsing import CommandParser, OneLineParser, UsageError
from .predict import add_predict_command
from .profile import add_profile_command
from .schedules import add_schedules_command
from .search import add_search_command
from .train_predictors import add_train_predictors_command
from .visualize import add_visualize_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 2 after one line on stderr that says what is wrong; 1 if nobody reads.

    What the caller can mend gets one line; everything else is a fault of ours, and gets its traceback.
    """
    if not (sys.argv[1:] if argv is None else argv):
        build_parser().print_help(sys.stderr)
        return 2
    try:
        arguments = build_parser().parse_args(argv)
        command: Callable[[argparse.Namespace], None] = arguments.command
        _, remarks = consoles()
        with warnings_on(remarks):
            command(arguments)
        sys.stdout.flush()  # here, so that a reader who is gone is noticed here
    except (UsageError, InputError) as error:
        return _fail(str(error) or type(error).__name__)
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich, for tables
    except OSError as error:
        return _fail(_in_words(error))
    except RuntimeError as error:
        if "out of memory" not in str(error) and "not enough memory" not in str(error):
            raise
        return _fail("out of memory: try a smaller --batch-size")
    except KeyboardInterrupt as stop:
        if str(stop):  # training says how to continue it
            print(f"diffrate: {_as_options(str(stop))}", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"diffrate: error: {' '.join(_as_options(message).split())}", file=sys.stderr)
    return 2


def _in_words(error: OSError) -> str:
    """What went wrong with which file, without the number of the error."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _as_options(message: str) -> str:
    """A message of the library without Python's form of an option, which it gives in brackets: "(resume=True)"."""
    return re.sub(r" \(\w+=True\)", "", message)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = OneLineParser(
        prog="diffrate",
        description="Faster Vision Transformers: prunes and merges tokens by DiffRate. Start with: diffrate demo",
        epilog="Each command has examples in its own help: diffrate COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"diffrate_ext {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    add_demo_command(commands)
    add_predict_command(commands)
    add_schedules_command(commands)
    add_search_command(commands)
    add_finetune_command(commands)
    add_evaluate_command(commands)
    add_compare_command(commands)
    add_train_predictors_command(commands)
    add_benchmark_command(commands)
    add_profile_command(commands)
    add_visualize_command(commands)
    add_info_command(commands)
    return parser
