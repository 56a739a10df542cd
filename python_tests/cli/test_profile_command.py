"""``diffrate profile``, and searches by what it wrote."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import timm
import torch
from command_line import assert_is_a_drawing, fails, rows, search
from tiny_costs import table_of
from tiny_models import tiny_caformer

from diffrate_ext import CostTable, Schedule, embedded, flops, profiling, timing, uniform_schedule
from diffrate_ext.cli.main import main
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.machine import processor
from diffrate_ext.models import adapter_for


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """Of the embedded model, where an attention half takes nothing but every MLP."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    table_of(embedded.build_model(), attention=lambda tokens: 0.0, reduction=lambda tokens: 0.0, every=8).save(path)
    return path


def test_profile(tmp_path, capsys):
    output = tmp_path / "mine.json"
    argv = ["profile", "--model", "test_vit", "--batch-size", "2", "--rounds", "1", "--output", str(output)]
    assert main(argv) == 0
    table = CostTable.load(output)
    assert (table.model, table.batch_size, table.threads) == ("test_vit.r160_in1k", 2, torch.get_num_threads())
    found = rows(capsys.readouterr().out)
    assert list(found) == ["100%", "80%", "60%", "50%"]
    assert all(re.fullmatch(r"[+-]\d+\.\d%", cells[2]) for cells in found.values())
    assert float(found["100%"][1]) == pytest.approx(table.uncompressed, rel=1e-3)
    assert_is_a_drawing(tmp_path / "mine.png", ink=0.01)


def test_search_for_a_speed_up(costs, tmp_path, capsys):
    folder = tmp_path / "found"
    assert main(search(folder, "--speedup", "1.5", "--costs", str(costs))) == 0
    out = capsys.readouterr().out
    assert re.search(r"1\.5x, the search ended at .* ms for a batch, the schedule is to take .* GFLOPs", out)
    assert "measured" not in out
    model, schedule = embedded.build_model(), Schedule.load(folder / "schedule.json")
    costing = costing_of(model, CostTable.load(costs))
    kept = [[left for _, left in numbers] for numbers in adapter_for(model).kept_numbers(schedule)]
    assert costing.of(kept) == pytest.approx(costing.uncompressed / 1.5, rel=0.01)
    assert flops(model, schedule) < flops(model)


def test_a_search_ends_with_the_speed_up_as_measured(costs, tmp_path, monkeypatch, capsys):
    table = CostTable.load(costs)
    here = replace(table, device=processor(torch.device("cpu")), threads=torch.get_num_threads())
    here.save(tmp_path / "here.json")
    timed = []

    def interleaved(calls, rounds, *, warmup, device):
        timed.append(len(calls))
        for _ in range(rounds):
            yield [0.24, 0.2, 0.1]

    monkeypatch.setattr(timing, "interleaved", interleaved)
    argv = search(tmp_path / "f", "--speedup", "1.2", "1.4", "--costs", str(tmp_path / "here.json"))
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert timed == [3]  # the uncompressed model and both that were found
    assert re.findall(r"measured: .*", captured.out) == [
        "measured: 200 ms, 1.20x ±0.00",
        "measured: 100 ms, 2.40x ±0.00, for 1.40x by the table: profile again, and see what its check says",
    ]
    assert "Not measured" not in captured.err


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": 99}])
def test_a_table_of_another_machine_is_not_measured(change, costs, tmp_path, capsys):
    table = CostTable.load(costs)
    here = replace(table, device=processor(torch.device("cpu")), threads=torch.get_num_threads())
    replace(here, **change).save(tmp_path / "there.json")
    assert main(search(tmp_path / "f", "--speedup", "1.2", "--costs", str(tmp_path / "there.json"))) == 0
    captured = capsys.readouterr()
    assert "measured:" not in captured.out
    assert "Not measured here: the costs are of " in captured.err


def test_several_targets_and_the_comparison_with_uniform(costs, tmp_path, capsys):
    quick = ["--held-out", "16", "--steps", "1", "--batch-size", "2", "--workers", "0"]
    argv = ["search", *quick, "--costs", str(costs), "--speedup", "1.2", "1.4", "--output", str(tmp_path / "f")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "f/1.2x/schedule.json").exists()
    assert (tmp_path / "f/1.4x/search.png").exists()
    assert len(re.findall(r"ms on 16 images that were not learned from", out)) == 2


def test_latency(costs, tmp_path, capsys):
    target = 0.8 * costing_of(embedded.build_model(), CostTable.load(costs)).uncompressed
    assert main(search(tmp_path / "f", "--latency", f"{target:.6f}", "--costs", str(costs))) == 0
    assert "1.25x, the search ended at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speedup", "1.5"], "--speedup needs --costs FILE, which diffrate profile writes"),
        (["--costs", "COSTS"], "--costs are for targets of time: add --speedup or --latency"),
        (["--costs", "COSTS", "--speedup", "1.5", "--gflops", "60%"], "name different kinds of targets"),
        (["--costs", "COSTS", "--speedup", "1.5", "1.5"], "--speedup names a target twice: 1.5x 1.5x"),
        (["--costs", "COSTS", "--speedup", "0"], "expected a number above 0, got '0'"),
        (["--costs", "COSTS", "--speedup", "500"], "ms cannot be reached"),
        (["--costs", "OTHER", "--speedup", "1.5"], "the costs are of another model"),
    ],
)
def test_errors(options, message, costs, tmp_path, capsys):
    table_of(tiny_caformer()).save(tmp_path / "other.json")
    names = {"COSTS": str(costs), "OTHER": str(tmp_path / "other.json")}
    assert message in fails(search(tmp_path / "f", *(names.get(one, one) for one in options)), capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.png", "--output: expected a name that ends in .json, beside which the plot goes; got"),
        ("folder.json", "folder.json is a folder, or there is none to hold it"),
        ("missing/costs.json", "costs.json is a folder, or there is none to hold it"),
    ],
)
def test_where_a_table_cannot_go(name, message, tmp_path, capsys):
    (tmp_path / "folder.json").mkdir()
    assert message in fails(["profile", "--output", str(tmp_path / name)], capsys)


@pytest.mark.parametrize("speed_up", [1.0, 3.0])
def test_a_table_that_is_off_says_so(speed_up, tmp_path, monkeypatch, capsys):
    """The check is given times in place of measuring them."""

    def interleaved(calls, rounds, *, warmup, device):
        for _ in range(rounds):
            yield [1.0, *[1.0 / speed_up] * (len(calls) - 1)]

    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(profiling, "profile_model", lambda model, **_: table_of(model))
    assert main(["profile", "--model", "test_vit", "--output", str(tmp_path / "c.json")]) == 0
    assert re.search(r"The table is off by \d+%: measure again", capsys.readouterr().err)


def test_a_table_that_is_right_does_not(tmp_path, monkeypatch, capsys):
    model = timm.create_model("test_vit")
    table = table_of(model)
    costing = costing_of(model, table)
    monkeypatch.setattr(profiling, "profile_model", lambda model, **_: table)
    schedules = [uniform_schedule(model, share) for share in ("80%", "60%", "50%")]

    def interleaved(calls, rounds, *, warmup, device):
        for _ in range(rounds):
            yield [costing.uncompressed, *map(costing.of_schedule, schedules)]

    monkeypatch.setattr(timing, "interleaved", interleaved)
    assert main(["profile", "--model", "test_vit", "--output", str(tmp_path / "c.json")]) == 0
    assert "off by" not in capsys.readouterr().err
