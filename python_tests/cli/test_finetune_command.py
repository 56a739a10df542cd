"""``diffrate finetune``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import TEST_VIT, fails, rows
from safetensors.torch import load_file

from diffrate_ext import FinetuneSettings, InputValueError, embedded
from diffrate_ext.cli.main import main
from diffrate_ext.compression.flops import flops
from diffrate_ext.schedule import Schedule


def command(folder, *options: str) -> list[str]:
    """Arguments of a run of two steps."""
    return ["finetune", "--steps", "2", "--batch-size", "2", "--workers", "0", "--output", str(folder), *options]


@pytest.fixture
def few_embedded_images(monkeypatch):
    load_images = embedded.load_images
    monkeypatch.setattr(embedded, "load_images", lambda split: tuple(part[:24] for part in load_images(split)))


@pytest.fixture
def validation(labelled, tmp_path):
    """Beside the folder of labelled pictures."""
    return shutil.copytree(labelled, tmp_path / "validation")


def test_the_embedded_model_and_what_it_leaves(few_embedded_images, tmp_path, capsys):
    """Without arguments but the number of steps; then the weights in other commands."""
    folder = tmp_path / "tuned"
    assert main(command(folder, "--lr", "0.01")) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("top-1 ")
    assert "on 24 images" in captured.out
    for name in ("model.safetensors", "schedule.json"):
        assert str(folder / name) in captured.out
    lines = captured.err.splitlines()
    assert lines[0] == "evaluating on 24 images of the embedded test images"
    assert lines[2].startswith("fine-tuning  step 2/2  loss ")
    assert "accuracy" in lines[2]
    schedule = Schedule.load(folder / "schedule.json")
    assert flops(embedded.build_model(), schedule) / 1e9 == pytest.approx(0.5 * 0.3509, rel=0.01)
    found, before = load_file(folder / "model.safetensors"), embedded.load_model().state_dict()
    assert found.keys() == before.keys()
    assert not torch.equal(found["head.weight"], before["head.weight"])
    after = json.loads((folder / "history.json").read_text())["after"]

    files = ["--weights", str(folder / "model.safetensors"), "--schedule", str(folder / "schedule.json")]
    assert main(["evaluate", *files, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["results"][1]
    assert evaluated["top1"] == after["top1"]
    assert evaluated["loss"] == pytest.approx(after["loss"], rel=1e-5)


def test_resuming(few_embedded_images, tmp_path, capsys):
    folder = tmp_path / "tuned"
    assert main(command(folder)) == 0
    weights = (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert "holds a fine-tuning already" in fails(command(folder), capsys)
    assert main(command(folder, "--resume")) == 0
    captured = capsys.readouterr()
    assert "step" not in captured.err
    assert captured.out.startswith("was finished before: top-1 ")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert "seed: 0 then, 1 now" in fails(command(folder, "--resume", "--seed", "1"), capsys).replace("\n", " ")
    assert main(command(tmp_path / "new", "--resume")) == 0
    assert "holds no fine-tuning yet" in capsys.readouterr().err


def test_the_users_pictures_schedule_and_method(labelled, validation, tmp_path, capsys):
    folder = tmp_path / "tuned"
    argv = command(folder, *TEST_VIT, "--images", str(labelled), "--validation", str(validation), "--gflops", "0.03")
    assert main([*argv, "--method", "evit"]) == 0
    captured = capsys.readouterr()
    assert "accuracy" in captured.err
    assert "on 4 images" in captured.out
    schedule = Schedule.load(folder / "schedule.json")
    assert schedule.method == "evit"

    again = command(tmp_path / "again", *argv[9:-2], "--schedule", str(folder / "schedule.json"))
    assert main(again) == 0
    assert (tmp_path / "again" / "history.json").read_text() == (folder / "history.json").read_text()
    assert main([*again, "--resume"]) == 0


def test_without_images_to_evaluate_on_it_says_so(labelled, tmp_path, capsys):
    argv = command(tmp_path / "tuned", *TEST_VIT, "--images", str(labelled), "--gflops", "0.03")
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "whether the accuracy falls is not measured" in captured.err
    assert captured.out.startswith("fine-tuned\n")


def test_a_fall_is_said_plainly(few_embedded_images, tmp_path, capsys):
    assert main(command(tmp_path / "tuned", "--lr", "1000", "--steps", "4")) == 0
    captured = capsys.readouterr()
    assert "top-1 FELL from " in captured.out
    assert "Fine-tuning made the model worse" in captured.err
    assert "docs/finetune.md" in captured.err


def test_pictures_without_labels(folder, tmp_path, capsys):
    argv = command(tmp_path / "tuned", *TEST_VIT, "--images", str(folder), "--gflops", "0.03")
    assert "add --distill 1" in fails(argv, capsys)
    assert main([*argv, "--distill", "1"]) == 0
    assert "agreement" in capsys.readouterr().err


def test_a_model_without_classes(folder, labelled, tmp_path, monkeypatch, capsys):
    import timm

    from diffrate_ext.cli import finetune as module

    monkeypatch.setattr(module, "model_named", lambda _: timm.create_model("test_vit", num_classes=0))
    argv = ["--model", "test_vit", "--images", str(labelled), "--validation", str(folder), "--gflops", "0.03"]
    assert main(command(tmp_path / "tuned", *argv)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("cosine ")
    assert "only 1 keeps its features" in fails(command(tmp_path / "other", *argv, "--distill", "0.5"), capsys)


def test_options_are_passed_on(tmp_path, monkeypatch):
    from diffrate_ext.finetuning import loop
    from diffrate_ext.training import data

    seen = {}

    def loader(source, model, **options):
        seen.update(options, where=source.where, labelled=source.labelled)
        return []

    def run(model, schedule, loader, settings, **options):
        seen.update(schedule=schedule, settings=settings, resume=options["resume"], fingerprint=options["fingerprint"])
        loader(3)
        raise InputValueError("enough")

    monkeypatch.setattr(data, "training_loader", loader)
    monkeypatch.setattr(loop, "finetune", run)
    monkeypatch.chdir(tmp_path)
    words = "finetune --gflops 0.2 --steps 70 --batch-size 6 --lr 0.5 --min-lr 0.1 --weight-decay 0.01 --drop-path 0.3 "
    words += "--warmup-steps 2 --amp --mixup 0.3 --cutmix 0.4 --distill 0.25 --label-smoothing 0.2 --augment "
    words += "--workers 2 --seed 9 --split test --resume --method random"
    assert main(words.split()) == 2
    assert seen["settings"] == FinetuneSettings(
        steps=70,
        lr=0.5,
        min_lr=0.1,
        warmup_steps=2,
        weight_decay=0.01,
        drop_path=0.3,
        smoothing=0.2,
        distill=0.25,
        amp=True,
        seed=9,
    )
    for name, value in {
        "batch_size": 6,
        "steps": 70,
        "start": 3,
        "seed": 9,
        "augment": True,
        "mixup": 0.3,
        "cutmix": 0.4,
        "smoothing": 0,
        "workers": 2,
        "resume": True,
        "labelled": True,
        "where": "the embedded test images",
    }.items():
        assert seen[name] == value, name
    assert seen["schedule"].method == "random"
    assert flops(embedded.build_model(), seen["schedule"]) / 1e9 == pytest.approx(0.2, rel=0.01)
    assert seen["fingerprint"]["global batch size"] == 6


def test_the_recipe_is_the_papers(labelled, tmp_path, monkeypatch):
    from diffrate_ext.finetuning import loop

    seen = []

    def run(model, schedule, loader, settings, **options):
        seen.append((settings, options["fingerprint"]))
        raise InputValueError("enough")

    monkeypatch.setattr(loop, "finetune", run)
    argv = ["finetune", *TEST_VIT, "--images", str(labelled), "--gflops", "0.03", "--output", str(tmp_path / "x")]
    assert main(argv) == 2
    assert main(["finetune", "--output", str(tmp_path / "x")]) == 2
    (settings, facts), (ours, _) = seen
    assert settings == FinetuneSettings()
    assert ours == FinetuneSettings(steps=50, lr=8e-4)
    assert (facts["mixup"], facts["cutmix"], facts["augment"]) == (0.8, 1.0, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TEST_VIT], "--model needs --images"),
        ([*TEST_VIT, "--images", "."], "--model needs --schedule FILE or --gflops G"),
        (["--images", "."], "--images needs --model"),
        (["--gflops", "0.2", "--schedule", "x"], "not allowed with"),
        (["--gflops", "9"], "9"),
        (["--method", "dance"], "method must be one of diffrate, tome, evit, dynamicvit, random, got 'dance'"),
        (["--schedule", "/no/such/schedule.json"], "/no/such/schedule.json"),
        (["--weights", "/no/such/weights.safetensors"], "no such file of weights"),
        (["--distill", "2"], "distill must lie in [0, 1]"),
        (["--warmup-steps", "50"], "warmup_steps must be below steps = 50"),
        (["--output", "/dev/null/x"], "/dev/null is a file"),
    ],
)
def test_wrong_arguments(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in fails(["finetune", *argv], capsys)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_learn_what_one_learns(tmp_path):
    import numpy as np
    from PIL import Image
    from two_processes import torchrun

    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        picture = Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((170, 170))
        picture.save(tmp_path / "pictures" / f"{i}.png")
    options = [*TEST_VIT, "--images", str(tmp_path / "pictures"), "--gflops", "0.025", "--distill", "1", "--lr", "0.1"]
    options += ["--drop-path", "0", "--steps", "3"]  # not the same branches in two processes as in one
    two = torchrun("-m", "diffrate_ext", *command(tmp_path / "two", *options, "--batch-size", "2"))
    assert two.returncode == 0, two.stderr
    assert main(command(tmp_path / "one", *options, "--batch-size", "4")) == 0
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    records = [json.loads((tmp_path / name / "history.json").read_text())["records"] for name in ("two", "one")]
    for there, here in zip(*records, strict=True):
        assert there == pytest.approx(here, rel=1e-3)
        assert here["learning_rate"] == there["learning_rate"]
    moved = torch.cat([tensor.flatten() for name, tensor in wanted.items() if name != "pos_embed"])
    other = torch.cat([tensor.flatten() for name, tensor in found.items() if name != "pos_embed"])
    # Adam divides by the gradient's size: where that is 0 but for rounding, weights differ
    assert ((moved - other).abs() < 1e-4).float().mean() > 0.98


def test_rows_of_an_evaluation_say_the_method(tmp_path, labelled, capsys):
    folder = tmp_path / "tuned"
    argv = [*TEST_VIT, "--images", str(labelled)]
    assert main(command(folder, *argv, "--gflops", "0.03", "--method", "evit", "--steps", "1")) == 0
    capsys.readouterr()
    evaluated = ["evaluate", *argv, "--workers", "0", "--schedule", str(folder / "schedule.json")]
    assert main(evaluated) == 0
    assert list(rows(capsys.readouterr().out)) == ["uncompressed", "evit tuned"]
