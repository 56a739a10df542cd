"""``diffrate benchmark``: what is timed, and what it says of where compression pays. No test looks at a time."""

from __future__ import annotations

import json
import re
from argparse import Namespace

import pytest
import torch
from command_line import assert_is_a_drawing, fails, rows

from diffrate_ext import embedded, flops, timing
from diffrate_ext.cli.main import main
from diffrate_ext.cli.untrained import untrained_named

QUICK = ["benchmark", "--rounds", "1", "--gflops", "60%"]
SMALL = ["--model", "test_vit", "--image-size", "64", "96"]


@pytest.fixture
def speed_ups(monkeypatch):
    """In place of timing: so many times as fast are the compressed models, by batch size."""

    def given(by_batch):
        def interleaved(calls, rounds, *, warmup, device):
            for _ in range(rounds):
                yield [2.0, *[2.0 / by_batch[batch_sizes[-1]]] * (len(calls) - 1)]

        batch_sizes = []
        init = timing.Comparison.__init__

        def remember(self, model, schedules, images, **options):
            batch_sizes.append(len(images))
            init(self, model, schedules, images, **options)

        monkeypatch.setattr(timing.Comparison, "__init__", remember)
        monkeypatch.setattr(timing, "interleaved", interleaved)

    return given


def test_several_batch_sizes_and_the_verdict(speed_ups, capsys):
    speed_ups({1: 0.8, 2: 1.0, 3: 1.5})
    assert main([*QUICK, "60%", "--batch-size", "3", "1", "2", "3"]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [(row[0], row[3]) for row in cells] == [
        (name, gain)
        for batch, speed_up in (("1", "0.80x"), ("2", "1.00x"), ("3", "1.50x"))
        for name, gain in (
            (f"batch {batch}, eager", ""),
            ("uncompressed", "1.00x"),
            ("uniform 60%", f"{speed_up} ({speed_up[:-1]}-{speed_up[:-1]})"),
        )
    ]
    assert "uniform 60%, eager: pays from batch size 3 on, not at 1 (0.80x), 2 (1.00x, within the noise)\n" in out


def test_json(speed_ups, capsys):
    speed_ups({1: 0.8, 4: 1.5})
    assert main([*QUICK, "--batch-size", "1", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["device"], found["dtype"]) == ("embedded ViT", "cpu", "float32")
    assert found["threads"] == torch.get_num_threads()
    full = flops(embedded.build_model()) / 1e9
    assert [(row["batch_size"], row["speed_up"]) for row in found["speeds"]] == [(1, 0.8), (4, 1.5)]
    for row in found["speeds"]:
        assert (row["schedule"], row["run"], row["tokens"]) == ("uniform 60%", "eager", 197)
        assert row["uncompressed_gflops"] == full
        assert row["gflops"] == pytest.approx(0.6 * full, rel=0.01)
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / 2 * row["speed_up"])
        assert row["realised_gain"] == pytest.approx(row["speed_up"] / row["flops_ratio"])
    (point,) = found["break_even"]
    assert (point["pays_from"], point["faster_at"], point["slower_at"]) == (4, [4], [1])
    assert point["verdict"] == "pays from batch size 4 on, not at 1 (0.80x)"
    assert [(best["batch_size"], best["speed_up"]) for best in found["fastest"]] == [(1, 0.8), (4, 1.5)]
    assert found["not_run"] == []


def test_published_schedules_where_there_are_any(capsys):
    argv = ["benchmark", "--model", "deit_tiny_patch16_224", "--batch-size", "1", "--rounds", "1", "--json"]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "bfloat16"
    published = (1.0, 0.9, 0.8, 0.7, 0.6)
    assert [row["schedule"] for row in found["speeds"]] == [f"published {gflops:g}" for gflops in published]
    for row, gflops in zip(found["speeds"], published, strict=True):
        assert row["gflops"] == pytest.approx(gflops, abs=0.06)
        assert row["flops_ratio"] == pytest.approx(row["uncompressed_gflops"] / row["gflops"])


def test_the_model_that_is_timed():
    asked = Namespace(model="test_vit", device="cpu", threads=None, dtype="bfloat16")
    model = untrained_named(asked, 64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.patch_embed.img_size == (64, 64)
    assert not model.training
    assert untrained_named(Namespace(**{**vars(asked), "model": None, "dtype": "float32"})).patch_embed.img_size == (
        28,
        28,
    )


def test_image_sizes_a_plot_and_what_cannot_be_run(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU, where graphs can be run")
    plot = tmp_path / "speed.png"
    argv = [*QUICK, *SMALL, "--batch-size", "2", "--run", "eager", "graph", "--plot", str(plot)]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert [line for line in rows(captured.out) if "batch" in line] == ["17 tokens, batch 2,", "37 tokens, batch 2,"]
    assert re.search(r"uniform 60%, eager: (pays|does not pay) .*tokens", captured.out)
    for tokens in (17, 37):
        assert f"Not run: graph, {tokens} tokens, batch size 2: no GPU" in captured.out
    assert "fastest" not in captured.out  # there is one way
    assert_is_a_drawing(plot, ink=0.01)


def test_the_fastest_of_several_ways(speed_ups, monkeypatch, capsys):
    speed_ups({1: 1.25})
    monkeypatch.setattr(timing, "in_way", lambda way, model, images: (model, None))
    assert main([*QUICK, "--batch-size", "1", "--run", "eager", "compiled"]) == 0
    out = capsys.readouterr().out
    best = "the fastest compressed model (uniform 60%, eager) is 1.25x as fast as the fastest uncompressed one (eager)"
    assert f"At batch size 1 {best}\n" in out
    assert "uniform 60%, compiled: pays at batch size 1" in out


def test_schedules_of_other_image_sizes(tmp_path, capsys):
    """Published ones are for one size; those of a file must fit."""
    argv = ["benchmark", "--rounds", "1", "--batch-size", "1", "--model", "deit_tiny_patch16_224"]
    assert main([*argv, "--image-size", "64"]) == 0
    assert "uniform 80%" in rows(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "32"], "--image-size needs --model NAME: the embedded model takes 28 x 28 pixels"),
        (["--model", "test_vit", "--image-size", "0"], "'0'"),
        (["--model", "test_vit", "--image-size", "8"], "--image-size 8: "),
        (["--run", "fast"], "'fast'"),
        (["--plot", "no/such/folder/plot.png"], "no/such/folder"),
    ],
)
def test_errors(options, message, capsys):
    assert message in fails([*QUICK, *options], capsys)


def test_nothing_that_can_be_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU, where graphs can be run")
    assert main([*QUICK, "--batch-size", "1", "--run", "graph"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("diffrate: error: nothing could be run: no GPU\n")
