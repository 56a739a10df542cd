"""``diffrate evaluate``."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from command_line import TEST_VIT, fails, rows
from PIL import Image

import diffrate_ext
from diffrate_ext.cli.main import main
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule


def test_evaluate(labelled, capsys):
    argv = ["evaluate", *TEST_VIT, "--images", str(labelled), "--workers", "0", "--batch-size", "3"]
    assert main([*argv, "--gflops", "0.03", "0.02"]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert list(table) == ["uncompressed", "uniform 0.03 GFLOPs", "uniform 0.02 GFLOPs"]
    assert [float(row[0]) for row in table.values()] == pytest.approx([0.03768, 0.03, 0.02], rel=0.02)
    for _, top1, loss, agreement, speed, _ in table.values():
        assert all(re.fullmatch(r"\d+\.\d\d%", share) for share in (top1, agreement))
        assert float(loss) > 0
        assert float(speed) > 0
    assert table["uncompressed"][5] == "1.00x"
    assert all(re.fullmatch(r"\d+\.\d\dx ±\d+\.\d\d", row[5]) for row in list(table.values())[1:])
    assert table["uncompressed"][3] == "100.00%"
    assert "4 images" in captured.out


def test_evaluate_as_json_finds_what_the_library_finds(labelled, tmp_path, capsys):
    from diffrate_ext.images.loading import evaluation_loader
    from diffrate_ext.images.sources import match_classes, open_images

    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    schedule = uniform_schedule(model, 0.02)
    schedule.save(tmp_path / "mine.json")
    argv = ["evaluate", "--model", "test_vit", "--weights", str(tmp_path / "weights.pth"), "--images", str(labelled)]
    assert main([*argv, "--schedule", str(tmp_path / "mine.json"), "--workers", "0", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    loader = evaluation_loader(match_classes(open_images(labelled), 1000), model, batch_size=4)
    plain = diffrate_ext.evaluate(model, loader)
    compressed = diffrate_ext.evaluate(diffrate_ext.compress(model, schedule), loader, plain.predictions)
    assert content["number_of_images"] == 4
    assert [result["schedule"] for result in content["results"]] == ["uncompressed", "mine.json"]
    for result, expected in zip(content["results"], (plain, compressed), strict=True):
        assert result["top1"] == expected.top1
        assert result["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert content["results"][1]["agreement"] == compressed.agreement
    assert content["results"][1]["gflops"] == flops(model, schedule) / 1e9


def test_a_learned_schedule_beside_a_uniform_one(tmp_path, capsys):
    (tmp_path / "learned").mkdir()
    uniform_schedule(diffrate_ext.embedded.load_model(), 0.25).save(tmp_path / "learned" / "schedule.json")
    argv = ["evaluate", "--schedule", str(tmp_path / "learned" / "schedule.json"), "--gflops", "60%", "0.25"]
    assert main([*argv, "--n-images", "20", "--rounds", "3", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["number_of_images"], content["rounds"]) == (20, 3)
    plain, learned, share, same = content["results"]
    assert [row["schedule"] for row in content["results"][1:]] == ["learned", "uniform 60%", "uniform 0.25 GFLOPs"]
    assert share["gflops"] == pytest.approx(0.6 * plain["gflops"], rel=0.01)
    assert (same["loss"], same["agreement"]) == (learned["loss"], learned["agreement"])
    for row in content["results"][1:]:
        low, high = row["speed_up_quartiles"]
        assert 0 < low <= row["speed_up"] <= high


def test_a_busy_machine_is_said(capsys, monkeypatch):
    argv = ["evaluate", "--n-images", "4", "--rounds", "1", "--gflops", "60%"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    for load, busy in ((1.9, False), (2.1, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 9.0, 9.0))
        assert main(argv) == 0
        assert (f"The machine is busy (load {load} on 4 cores)" in capsys.readouterr().err) == busy


def test_a_system_that_does_not_tell_its_load(monkeypatch):
    from diffrate_ext.machine import busy_machine

    monkeypatch.delattr("os.getloadavg")
    assert busy_machine() is None


def test_evaluate_without_labels(folder, capsys):
    argv = ["evaluate", *TEST_VIT, "--images", str(folder), "--workers", "0", "--gflops", "0.02", "--amp"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert {(row[1], row[2]) for row in table.values()} == {("-", "-")}
    assert "3 images" in captured.out
    assert "broken.jpg" in captured.err


def test_a_model_with_a_head_of_its_own(tmp_path, capsys):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "three.pth")
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (i * 90, 30, 200)).save(tmp_path / "images" / name / f"{i}.png")
    argv = ["evaluate", "--model", "test_vit", "--weights", str(tmp_path / "three.pth"), "--gflops", "0.025"]
    argv += ["--images", str(tmp_path / "images"), "--workers", "0", "--json"]
    assert "--num-classes" in fails(argv, capsys)
    assert main([*argv, "--num-classes", "3"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["results"][0]["top1"] <= 1


def test_labels_that_do_not_fit_leave_the_agreement(labelled, tmp_path, capsys):
    (tmp_path / "images" / "one").mkdir(parents=True)
    Image.new("RGB", (40, 40), (90, 30, 200)).save(tmp_path / "images" / "one" / "0.png")
    uniform_schedule(timm.create_model("test_vit"), 0.025).save(tmp_path / "schedule.json")
    argv = ["evaluate", *TEST_VIT, "--images", str(tmp_path / "images"), "--workers", "0", "--json"]
    assert main([*argv, "--schedule", str(tmp_path / "schedule.json")]) == 0
    captured = capsys.readouterr()
    assert "agreement only" in captured.err
    found = json.loads(captured.out)["results"]
    assert found[1]["schedule"] == tmp_path.name  # not schedule.json, as every search calls it
    assert found[1]["top1"] is None
