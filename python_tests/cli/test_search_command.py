"""``diffrate search``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import TEST_VIT, assert_is_a_drawing, fails, search

from diffrate_ext import InputValueError, embedded
from diffrate_ext.cli.main import build_parser, main
from diffrate_ext.cli.search import _settings
from diffrate_ext.compression.flops import flops
from diffrate_ext.schedule import Schedule


def test_search_on_the_embedded_model(tmp_path, capsys):
    folder = tmp_path / "search"
    assert main(search(folder)) == 0
    captured = capsys.readouterr()
    schedule = Schedule.load(folder / "schedule.json")
    model = embedded.build_model()
    assert flops(model, schedule) / 1e9 == pytest.approx(0.6 * 0.3509, rel=0.01)
    assert str(folder / "schedule.json") in captured.out
    assert "from the target" in captured.out
    assert captured.err.splitlines()[-1].startswith("0.2106 GFLOPs  step 2/2  loss ")
    assert_is_a_drawing(folder / "search.png", ink=0.1)
    history = json.loads((folder / "history.json").read_text())
    assert [record["step"] for record in history["records"]] == [0, 1]
    # of two images: soft targets are the default here
    assert {record["agreement"] for record in history["records"]} <= {0.0, 0.5, 1.0}

    assert main(search(folder, "--resume")) == 0
    captured = capsys.readouterr()
    assert "was finished before" in captured.out
    assert captured.err == ""
    assert Schedule.load(folder / "schedule.json") == schedule
    assert "holds a search already" in fails(search(folder), capsys)
    assert "seed: 0 then, 1 now" in fails(search(folder, "--resume", "--seed", "1"), capsys)


def test_search_for_a_method(tmp_path, capsys):
    folder = tmp_path / "search"
    assert main(search(folder, "--method", "tome:proportional_attention=false")) == 0
    assert Schedule.load(folder / "schedule.json").method == "tome:proportional_attention=false"
    capsys.readouterr()
    assert "then, 'diffrate' now" in fails(search(folder, "--resume"), capsys)
    assert "the search knows diffrate and tome" in fails(search(folder, "--method", "evit"), capsys)
    assert "has the options match, operations, importance" in fails(search(folder, "--method", "diffrate:a=b"), capsys)


def test_search_for_several_targets(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "search"
    argv = search(folder, "--gflops", "0.25", "0.15", "--tensorboard")
    from diffrate_ext.rate_search.rates import RateSearch

    gflops, calls = RateSearch.cost, []

    def interrupt_in_the_second(self):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return gflops(self)

    with monkeypatch.context() as patch:
        patch.setattr(RateSearch, "cost", interrupt_in_the_second)
        assert main(argv) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("diffrate: search stopped after step 1 of 2")
    assert error.endswith("continue with --resume")
    first = (folder / "0.25G" / "checkpoint.pt").stat().st_mtime_ns

    assert main([*argv, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "0.25 GFLOPs, was finished before" in output
    assert "0.15 GFLOPs, resumed after step 1" in output
    assert (folder / "0.25G" / "checkpoint.pt").stat().st_mtime_ns == first
    for target in (0.25, 0.15):
        schedule = Schedule.load(folder / f"{target}G" / "schedule.json")
        assert flops(embedded.build_model(), schedule) / 1e9 == pytest.approx(target, rel=0.01)
        assert list((folder / f"{target}G" / "tensorboard").iterdir())


def test_search_on_the_users_pictures(labelled, tmp_path, capsys):
    folder = tmp_path / "search"
    argv = search(folder, *TEST_VIT, "--images", str(labelled), "--gflops", "0.025", "--lr", "0.2")
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "accuracy" in captured.err
    assert len(Schedule.load(folder / "schedule.json")) == 6
    # random weights and a seed: the same again
    again = search(tmp_path / "again", *argv[11:])
    assert main(again) == 0
    assert (tmp_path / "again" / "history.json").read_text() == (folder / "history.json").read_text()


def test_search_passes_its_options_on(tmp_path, monkeypatch):
    from diffrate_ext.rate_search import loop
    from diffrate_ext.rate_search.settings import SearchSettings
    from diffrate_ext.training import data

    seen = {}

    def loader(source, model, **options):
        seen.update(options, where=source.where, labelled=source.labelled)
        return []

    def run(model, loader, gflops, settings, **options):
        seen.update(gflops=gflops, settings=settings, resume=options["resume"], fingerprint=options["fingerprint"])
        loader(3)
        raise InputValueError("enough")

    monkeypatch.setattr(data, "training_loader", loader)
    monkeypatch.setattr(loop, "search", run)
    words = "search --gflops 0.2 --steps 7 --batch-size 6 --lr 0.5 --min-lr 0.1 --weight-decay 0.01 --flops-weight 3 "
    words += "--flops-loss absolute --warmup-steps 2 --mask-gradient derivative --amp --granularity 4 "
    words += "--mixup 0.3 --cutmix 0.4 "
    words += "--no-soft-targets --label-smoothing 0.2 --augment --workers 2 --seed 9 --split test --resume"
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert seen["gflops"] == 0.2
    assert seen["settings"] == SearchSettings(
        steps=7,
        lr=0.5,
        min_lr=0.1,
        weight_decay=0.01,
        flops_weight=3,
        flops_loss="absolute",
        warmup_steps=2,
        mask_gradient="derivative",
        amp=True,
        granularity=4,
        seed=9,
    )
    for name, value in {
        "batch_size": 6,
        "steps": 7,
        "start": 3,
        "seed": 9,
        "rank": 0,
        "world": 1,
        "augment": True,
        "mixup": 0.3,
        "cutmix": 0.4,
        "smoothing": 0.2,
        "workers": 2,
        "resume": True,
        "labelled": True,
        "where": "the embedded test images",
    }.items():
        assert seen[name] == value, name
    for fact in ("mixup", "cutmix", "smoothing", "augment", "images", "global batch size"):
        assert fact in seen["fingerprint"]
    assert main(["search", "--soft-targets"]) == 2
    assert seen["settings"] == SearchSettings(steps=100, soft_targets=True)
    assert (seen["mixup"], seen["cutmix"], seen["smoothing"], seen["labelled"]) == (0, 0, 0, False)
    assert seen["gflops"] == pytest.approx(0.6 * 0.3509, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "device", "amp"),
    [([], "cuda", True), ([], "cpu", False), (["--no-amp"], "cuda", False), (["--amp"], "cpu", True)],
)
def test_mixed_precision_is_the_default_on_a_gpu(words, device, amp):
    arguments = build_parser().parse_args(["search", *words])
    assert _settings(arguments, torch.device(device)).amp is amp


def test_a_graph_is_for_those_who_ask(tmp_path, capsys):
    folder = tmp_path / "search"
    assert not _settings(build_parser().parse_args(["search"]), torch.device("cuda")).cuda_graph
    assert _settings(build_parser().parse_args(["search", "--cuda-graph"]), torch.device("cuda")).cuda_graph
    assert "needs a model on a CUDA device" in fails(search(folder, "--cuda-graph"), capsys)
    assert not folder.exists()


def test_search_without_labels(folder, tmp_path, capsys):
    argv = search(tmp_path / "search", *TEST_VIT, "--images", str(folder), "--gflops", "0.025")
    error = fails(argv, capsys)
    assert "has no labels" in error
    assert "--soft-targets" in error
    assert main([*argv, "--soft-targets"]) == 0
    captured = capsys.readouterr()
    assert f"left out {folder / 'broken.jpg'}, which cannot be read" in captured.err
    assert "agreement" in captured.err
    assert "UserWarning" not in captured.err


def test_search_with_other_classes(labelled, tmp_path, capsys):
    (labelled / "n01440764").rename(labelled / "tench")
    argv = search(tmp_path / "search", *TEST_VIT, "--images", str(labelled), "--gflops", "0.025")
    assert "2 classes" in fails(argv, capsys)


def test_search_that_diverges(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, _: logits.sum() * float("nan"))
    assert main(search(tmp_path / "search")) == 2
    assert "the loss or its gradient is not finite" in capsys.readouterr().err


def test_tensorboard_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = fails(search(tmp_path / "search", "--tensorboard"), capsys)
    assert "pip install tensorboard" in error
    assert not (tmp_path / "search").exists()


def test_resuming_nothing_is_said(tmp_path, capsys):
    argv = search(tmp_path / "nothing", "--steps", "1", "--batch-size", "2", "--resume")
    assert main(argv) == 0
    assert "holds no search yet" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_first(capsys):
    assert "cannot be written" in fails(search(Path("/proc/search")), capsys)


@pytest.mark.parametrize("pictures", ["folder", "labelled"])
def test_a_model_without_classes_keeps_its_features(pictures, request, tmp_path, monkeypatch, capsys):
    """With labels or without, and nobody has to say that they are soft targets."""
    import timm

    from diffrate_ext.cli import search as command

    monkeypatch.setattr(command, "model_named", lambda _: timm.create_model("test_vit", num_classes=0))
    images = str(request.getfixturevalue(pictures))
    argv = search(tmp_path / "found", "--model", "test_vit", "--images", images, "--gflops", "0.025")
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "cosine" in captured.err
    assert "agreement" not in captured.err
    assert (tmp_path / "found" / "search.png").exists()
    assert "has no classes" in fails([*search(tmp_path / "again", *argv[11:]), "--no-soft-targets"], capsys)
