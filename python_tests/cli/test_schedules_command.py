"""``diffrate schedules``, and targets given as shares."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command_line import fails, rows

from diffrate_ext.cli.main import build_parser, main
from diffrate_ext.schedule import Schedule


def test_all_of_them(capsys: Any) -> None:
    assert main(["schedules"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["ViT-S-DeiT"] == ["deit_small_patch16_224.fb_in1k", "3.1, 2.9, 2.7, 2.5, 2.3"]
    assert set(table) == {known.model for known in Schedule.available()}


def test_those_of_a_model(capsys: Any) -> None:
    assert main(["schedules", "--model", "deit_tiny_patch16_224"]) == 0
    assert list(rows(capsys.readouterr().out)) == ["ViT-T-DeiT"]
    assert main(["schedules", "--model", "CAFormer-S36", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [known["gflops"] for known in found] == [6.0, 5.6, 5.2]
    assert {known["weights"] for known in found} == {"caformer_s36.sail_in1k"}


def test_none(capsys: Any) -> None:
    assert main(["schedules", "--model", "vit_tiny_patch16_384"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "No schedules were published for vit_tiny_patch16_384" in captured.err


COMMANDS = [
    "demo",
    "evaluate",
    "compare",
    "search",
    "finetune",
    "train-predictors",
    "benchmark",
    "visualize",
    "predict",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_shares(command: str, capsys: Any) -> None:
    arguments = build_parser().parse_args([command, "--gflops", "60%"])
    assert arguments.gflops in ("60%", ["60%"])
    for wrong in ("0%", "101%", "sixty%", "many", "-1"):
        assert wrong in fails([command, f"--gflops={wrong}"], capsys)


def test_a_share_names_its_row(capsys: Any) -> None:
    assert main(["benchmark", "--batch-size", "1", "--rounds", "1", "--gflops", "60%", "0.3"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["batch 1, eager", "uncompressed", "uniform 60%", "uniform 0.3 GFLOPs"]
    assert [float(row[0]) for row in list(table.values())[1:]] == pytest.approx([0.351, 0.6 * 0.351, 0.3], abs=0.003)
