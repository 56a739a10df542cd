"""The help of every command."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

import pytest
from command_line import fails

from diffrate_ext.cli.main import build_parser, main


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


@pytest.mark.parametrize("command", parsers())
def test_help(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: diffrate {command}" in out
    assert "%" not in re.sub(r"\d%", "", out)  # what argparse fills in is filled in


@pytest.mark.parametrize("command", parsers())
def test_examples_are_whole_lines_that_parse(command: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    help = parsers()[command].format_help()
    examples = help.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        program, *argv = shlex.split(example)
        assert program == "diffrate"
        assert argv[0] == command
        build_parser().parse_args(argv)


@pytest.mark.parametrize("command", parsers())
def test_an_unknown_option_leads_to_the_help_of_its_command(command: str, capsys: Any) -> None:
    error = fails([command, "--nonsense", "1"], capsys)
    assert error == f"diffrate: error: unrecognized arguments: --nonsense 1 (see diffrate {command} --help)\n"


def test_an_option_that_is_nearly_right(capsys: Any) -> None:
    assert "did you mean --schedule?" in fails(["evaluate", "--shedule=x"], capsys)


RUN = [name for name in parsers() if name not in ("schedules", "info")]


@pytest.mark.parametrize("command", RUN)
@pytest.mark.parametrize("options", [["--no-pretrained"], ["--device", "cuda"], ["--threads", "3"]])
def test_options_that_all_commands_have(command: str, options: list[str]) -> None:
    arguments = build_parser().parse_args([command, *options])
    name = options[0].removeprefix("--").replace("-", "_")
    assert str(getattr(arguments, name)) == (options[1] if options[1:] else "True")


def test_threads_are_those_that_are_used(capsys: Any) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        assert main(["benchmark", "--batch-size", "1", "--rounds", "1", "--gflops", "60%", "--threads", "3"]) == 0
        assert "3 CPU threads" in capsys.readouterr().out
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
