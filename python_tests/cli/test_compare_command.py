"""``diffrate compare``."""

from __future__ import annotations

import json

import pytest
from command_line import QUICK, TEST_VIT, assert_is_a_drawing, fails, rows

from diffrate_ext import uniform_schedule
from diffrate_ext.cli.main import main
from diffrate_ext.embedded import load_model


def test_the_embedded_model(tmp_path, capsys):
    output = tmp_path / "compare.png"
    assert main(["compare", *QUICK, "--gflops", "0.25", "--methods", "tome", "evit", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert list(table) == ["uncompressed", "tome 0.25 GFLOPs", "evit 0.25 GFLOPs"]
    assert table["uncompressed"][2:4] == ["100.0%", "1.0000"]
    assert [float(row[0]) for row in table.values()] == pytest.approx([0.351, 0.25, 0.25], abs=0.003)
    for _, top1, agreement, cosine, speed, speed_up in table.values():
        assert top1.endswith("%")
        assert agreement.endswith("%")
        assert 0.9 < float(cosine) <= 1
        assert float(speed) > 0
        assert speed_up.endswith("x")
    assert "16 images" in captured.out
    assert str(output) in captured.out
    assert_is_a_drawing(output, ink=0.02)


def test_the_users_pictures_and_a_schedule(folder, tmp_path, capsys):
    learned = tmp_path / "mine" / "schedule.json"
    learned.parent.mkdir()
    import timm

    uniform_schedule(timm.create_model("test_vit"), 0.025).save(learned)
    argv = ["compare", *TEST_VIT, "--images", str(folder), "--rounds", "1", "--schedule", str(learned)]
    assert main([*argv, "--output", str(tmp_path / "plot.png")]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert list(table) == ["uncompressed", "diffrate mine"]
    assert table["diffrate mine"][1] == "-"  # no labels, no accuracy
    assert "Random weights" in captured.err
    assert "skipped" in captured.err


def test_json(tmp_path, capsys):
    argv = ["compare", *QUICK, "--gflops", "0.25", "--methods", "random", "--json"]
    assert main([*argv, "--output", str(tmp_path / "plot.png")]) == 0
    first, row = json.loads(capsys.readouterr().out)
    assert first["method"] == "uncompressed"
    assert first["cosine"] == pytest.approx(1)
    assert row["method"] == "random"
    assert row["schedule"] == "0.25 GFLOPs"
    assert tuple(row["after_merging"]) == uniform_schedule(load_model(), 0.25, method="random").after_merging
    assert row["after_pruning"] is None
    assert row["images"] == 16


def test_says_what_is_left_out(tmp_path, capsys):
    """0.1 GFLOPs are less than DiffRate's usual schedules reach, and EViT's."""
    assert main(["compare", *QUICK, "--gflops", "0.1", "0.3", "--output", str(tmp_path / "plot.png")]) == 0
    captured = capsys.readouterr()
    shown = list(rows(captured.out))
    for method in ("diffrate", "tome", "evit", "random"):
        missing = f"{method} 0.1 GFLOPs" not in shown
        assert (f"{method} cannot run this model, or not reach all targets: 1 of 2" in captured.err) == missing
    assert "dynamicvit" not in captured.err  # nothing was trained, and nobody asked for it
    assert len(shown) < 9


def test_errors(tmp_path, capsys, folder):
    assert "method must be one of diffrate, tome, evit, dynamicvit, random, got 'x'" in fails(
        ["compare", "--methods", "x", "--n-images", "4"], capsys
    )
    assert "cannot be reached" in fails(["compare", "--gflops", "9", "--n-images", "4"], capsys)
    assert "--model needs --images PATH" in fails(["compare", *TEST_VIT], capsys)
    for name in ("a", "b"):
        (tmp_path / name / "mine").mkdir(parents=True)
        uniform_schedule(load_model(), 0.25).save(tmp_path / name / "mine" / "schedule.json")
    two = [str(tmp_path / name / "mine" / "schedule.json") for name in ("a", "b")]
    assert "two files have one name" in fails(["compare", "--schedule", *two, "--n-images", "4"], capsys)
