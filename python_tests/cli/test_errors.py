"""Wrong arguments and bad files: one line that says what is wrong."""

from __future__ import annotations

import pytest
from command_line import TEST_VIT, fails

from diffrate_ext import DivergedError, InputTypeError, InputValueError
from diffrate_ext.cli.main import main
from diffrate_ext.schedule import Schedule


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--n-images", "0"], "at least 1, got '0'"),
        (["demo", "--n-images", "many"], "at least 1, got 'many'"),
        (["demo", "--n-images", "2001"], "1 .. 2000"),
        (["demo", "--images", "."], "--images needs --model"),
        (["demo", "--weights", "x"], "no such file of weights: x"),
        (["demo", "--no-pretrained"], "--no-pretrained needs --model"),
        (["demo", "--model", "test_vit"], "--model needs --images"),
        (["demo", *TEST_VIT, "--images", "/no/such/folder"], "/no/such/folder"),
        (["demo", *TEST_VIT, "--weights", "x", "--images", "."], "not allowed with"),
        (["demo", "--gflops", "9"], "9"),
        (["demo", "--gflops", "many"], "up to 100%, got 'many'"),
        (["demo", "--schedule", "/no/such/schedule.json"], "/no/such/schedule.json"),
        (["demo", "--output", "/no/such/folder/x.png"], "/no/such/folder"),
        (["demo", "--output", "x.docx"], "x.docx"),
        (["demo", "--device", "abacus"], "abacus"),
        (["demo", "--schedule", "."], "error: .: Is a directory\n"),
        (["predict", "--model", "test_vit"], "--model needs --image FILE"),
        (["predict", "--image", "x.png"], "--image needs --model"),
        (["predict", "--image", "x.png"], "needs --model"),
        (["predict", *TEST_VIT, "--image", "."], "--image: . is a folder"),
        (["predict", "--gflops", "0.2", "--schedule", "x"], "not allowed with"),
        (["benchmark", "--model", "deit_tiny"], "the nearest names are deit_tiny_patch16_224,"),
        (["search", "--steps", "0"], "at least 1, got '0'"),
        (["search", "--lr", "fast"], "at least 0, got 'fast'"),
        (["search", "--warmup-steps", "-1"], "at least 0, got '-1'"),
        (["search", "--lr", "0.1", "--min-lr", "0.2"], "min_lr must not be above lr"),
        (["search", "--images", "."], "--images needs --model"),
        (["search", *TEST_VIT], "--model needs --images"),
        (["search", *TEST_VIT, "--images", "/no/such/folder"], "/no/such/folder"),
        (["search", "--split", "val"], "'search' and 'test', got 'val'"),
        (["search", "--gflops", "0.2", "9"], "9 GFLOPs cannot be reached: the model takes 0.3509"),
        (["evaluate", "--gflops", "80"], "as a uniform schedule can keep. As a share, write '80%'"),
        (["search", "--gflops", "0.2", "0.2"], "a target twice"),
        (["search", "--mixup", "1", "--batch-size", "3"], "even"),
        (["search", "--device", "abacus"], "abacus"),
        (["search", "--output", "/dev/null/x"], "/dev/null is a file"),
        (["evaluate", "--images", "."], "--images needs --model"),
        (["evaluate", *TEST_VIT], "--model needs --images"),
        (["evaluate", "--split", "train"], "'search' and 'test', got 'train'"),
        (["evaluate", "--gflops", "9"], "9"),
        (["evaluate", "--schedule", "/no/such/schedule.json"], "/no/such/schedule.json"),
        (["benchmark", "--model", "no_such_model"], "no_such_model"),
        (["benchmark", "--model", "test_resnet"], "ResNet"),
        (["benchmark", "--dtype", "int8"], "int8"),
    ],
)
def test_wrong_arguments(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in fails(argv, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["search", "finetune"])
def test_pythons_form_of_an_option_is_for_python(command, tmp_path, capsys):
    (tmp_path / "schedule.json").touch()
    error = fails([command, "--output", str(tmp_path)], capsys)
    assert "--resume, or name another folder" in error
    assert "True" not in error


def test_empty_folder(tmp_path, capsys):
    assert "no pictures" in fails(["demo", *TEST_VIT, "--images", str(tmp_path)], capsys)


def test_folder_of_broken_pictures(folder, capsys):
    for path in folder.rglob("*.*"):
        path.write_text("no picture")
    assert "none of the 4 pictures could be read" in fails(["demo", *TEST_VIT, "--images", str(folder)], capsys)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', "\0\1"])
def test_bad_schedule_file(content, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert "bad.json" in fails(["demo", "--schedule", str(path)], capsys)


@pytest.mark.parametrize("command", ["demo", "evaluate", "benchmark", "visualize"])
def test_a_schedule_that_says_it_is_for_another_model(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Schedule([197, *[150] * 11], [197, *[140] * 11], model="deit_tiny_patch16_224.fb_in1k")
    other.save(tmp_path / "other.json")
    argv = [command, "--schedule", "other.json"]
    error = fails(argv, capsys)
    assert "made for deit_tiny_patch16_224.fb_in1k, and the model is vit_embedded_fashion_mnist" in error
    assert "--any-model" in error
    assert "True" not in error
    if command in ("benchmark", "visualize"):  # the quick ones
        quick = ["--rounds", "1", "--batch-size", "1"] if command == "benchmark" else ["--n-images", "1"]
        assert main([*argv, "--any-model", *quick]) == 0


def test_a_schedule_that_does_not_fit(tmp_path, capsys):
    path = tmp_path / "short.json"
    Schedule(after_pruning=[197, 100], after_merging=[197, 90]).save(path)
    assert "2 blocks" in fails(["benchmark", "--schedule", str(path)], capsys)


def test_out_of_memory_is_an_error_of_one_line(monkeypatch, capsys):
    def exhausted(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("diffrate_ext.embedded.build_model", exhausted)
    assert "--batch-size" in fails(["benchmark"], capsys)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, FloatingPointError])
def test_bugs_keep_their_traceback(error, monkeypatch):
    def broken(*_, **__):
        raise error("a bug")

    monkeypatch.setattr("diffrate_ext.embedded.build_model", broken)
    with pytest.raises(error, match="a bug"):
        main(["benchmark"])


@pytest.mark.parametrize("error", [InputValueError, InputTypeError, DivergedError, OSError])
def test_what_the_caller_can_mend_gets_one_line(error, monkeypatch, capsys):
    def refuse(*_, **__):
        raise error("bad input")

    monkeypatch.setattr("diffrate_ext.embedded.build_model", refuse)
    assert fails(["benchmark"], capsys) == "diffrate: error: bad input\n"
