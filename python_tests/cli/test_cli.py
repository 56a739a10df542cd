"""The command line, in process: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import diffrate_ext
from diffrate_ext import embedded
from diffrate_ext.cli.main import main
from diffrate_ext.schedule import Schedule

QUICK = ["--n-images", "16", "--batch-size", "8", "--rounds", "1"]
TEST_VIT = ["--model", "test_vit", "--no-pretrained"]


@pytest.fixture
def folder(tmp_path):
    """Three pictures and a broken one, in a folder and a sub-folder."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "sub/c.png"):
        Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_text("no picture")
    return folder


@pytest.fixture
def labelled(tmp_path):
    """Four pictures of two classes of ImageNet."""
    folder = tmp_path / "labelled"
    random = np.random.default_rng(1)
    for name in ("n01440764/a.png", "n01440764/b.png", "n01443537/a.png", "n01443537/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (180, 180, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def rows(output: str) -> dict[str, list[str]]:
    """The lines of a table, by their first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


def assert_is_a_drawing(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (pixels != 255).any(-1).mean() > 0.2


def fails(argv: list[str], capsys) -> str:
    """The one line on stderr of a call that must fail."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("diffrate: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_demo_on_the_embedded_model(tmp_path, capsys):
    output = tmp_path / "demo.png"
    assert main(["demo", *QUICK, "--search-steps", "2", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert list(table) == ["uncompressed", "uniform 60%", "learned 60%"]
    gflops = [float(row[0]) for row in table.values()]
    assert gflops == pytest.approx([0.351, 0.211, 0.211], abs=0.003)
    for _, loss, top1, agreement, speed, speed_up, _ in table.values():
        assert 0 < float(loss) < 3
        assert all(re.fullmatch(r"\d+\.\d%", share) for share in (top1, agreement))
        assert float(speed) > 0
        assert re.fullmatch(r"\d+\.\d\dx", speed_up)
    assert [float(row[6][:-1]) for row in table.values()] == pytest.approx([1, 1.667, 1.667], abs=0.02)
    assert "learning rates  step 2/2" in captured.err
    assert "16 images" in captured.out
    assert str(output) in captured.out
    assert_is_a_drawing(output)


def test_demo_reports_the_accuracy_that_evaluate_finds(tmp_path, capsys):
    from diffrate_ext.evaluation import evaluate

    images, labels = embedded.load_images("test")
    expected = evaluate(embedded.load_model(), [[embedded.normalize(images[:16]), labels[:16]]]).top1
    assert main(["demo", *QUICK, "--gflops", "0.3", "--output", str(tmp_path / "demo.png")]) == 0
    table = rows(capsys.readouterr().out)
    assert table["uncompressed"][2] == f"{expected:.1%}"
    assert list(table)[1:] == ["0.3 GFLOPs"]


def test_demo_on_the_users_pictures(folder, tmp_path, capsys):
    output = tmp_path / "demo.png"
    argv = ["demo", *TEST_VIT, "--images", str(folder), "--rounds", "1", "--output", str(output)]
    assert main(argv) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert len(table) == 4
    assert {row[1] for row in table.values()} == {"-"}  # no labels, no accuracy
    assert "3 images" in captured.out
    assert f"skipped {folder / 'broken.jpg'}: not a picture in a known format" in captured.err
    assert "random weights" in captured.err.lower()
    assert_is_a_drawing(output)


def test_n_images_limits_the_users_pictures(folder, tmp_path, capsys):
    argv = ["demo", *TEST_VIT, "--images", str(folder), "--n-images", "1", "--rounds", "1"]
    assert main([*argv, "--output", str(tmp_path / "demo.png")]) == 0
    captured = capsys.readouterr()
    assert "1 images" in captured.out
    assert "1 of 4 pictures" in captured.err


def test_schedules_from_files(tmp_path, capsys):
    schedule = Schedule(prune=[197, *[150] * 11], merge=[197, *[140] * 11])
    schedule.save(tmp_path / "mine.json")
    argv = ["demo", *QUICK, "--schedule", str(tmp_path / "mine.json"), "--output", str(tmp_path / "demo.png")]
    assert main(argv) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["uncompressed", "mine.json"]
    assert float(table["mine.json"][0]) == pytest.approx(schedule.gflops(embedded.build_model()), rel=1e-2)


def test_visualize(tmp_path, capsys):
    output = tmp_path / "tokens.png"
    assert main(["visualize", "--n-images", "2", "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert_is_a_drawing(output)


def test_visualize_a_users_picture(folder, tmp_path):
    output = tmp_path / "tokens.png"
    assert main(["visualize", *TEST_VIT, "--images", str(folder / "a.png"), "--output", str(output)]) == 0
    assert_is_a_drawing(output)


def test_benchmark(capsys):
    assert main(["benchmark", "--batch-size", "2", "--rounds", "1", "--gflops", "0.3", "0.2"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["uncompressed", "0.3 GFLOPs", "0.2 GFLOPs"]
    assert [float(row[0]) for row in table.values()] == pytest.approx([0.351, 0.3, 0.2], abs=0.003)


def test_benchmark_as_json_with_published_schedules(capsys):
    argv = ["benchmark", "--model", "deit_tiny_patch16_224", "--batch-size", "1", "--rounds", "1", "--json"]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["schedule"] for result in results] == [f"published {g:g}" for g in (1.0, 0.9, 0.8, 0.7, 0.6)]
    for result, gflops in zip(results, (1.0, 0.9, 0.8, 0.7, 0.6), strict=True):
        assert result["gflops"] == pytest.approx(gflops, abs=0.06)
        assert result["dtype"] == "bfloat16"
        assert result["flops_ratio"] == pytest.approx(result["uncompressed_gflops"] / result["gflops"])
        assert result["realised_gain"] == pytest.approx(result["speed_up"] / result["flops_ratio"])


def search(folder, *options: str) -> list[str]:
    """Arguments of a search of two steps."""
    return ["search", "--steps", "2", "--batch-size", "2", "--workers", "0", "--output", str(folder), *options]


def test_search_on_the_embedded_model(tmp_path, capsys):
    folder = tmp_path / "search"
    assert main(search(folder)) == 0
    captured = capsys.readouterr()
    schedule = Schedule.load(folder / "schedule.json")
    model = embedded.build_model()
    assert schedule.gflops(model) == pytest.approx(0.6 * 0.3509, rel=0.01)
    assert str(folder / "schedule.json") in captured.out
    assert "from the target" in captured.out
    assert captured.err.splitlines()[-1].startswith("0.2106 GFLOPs  step 2/2  loss ")
    assert_is_a_drawing(folder / "search.png")
    history = json.loads((folder / "history.json").read_text())
    assert [record["step"] for record in history["records"]] == [0, 1]
    # 1 of 2 right, or the like: hard labels, and a trained model
    assert {record["accuracy"] for record in history["records"]} <= {0.0, 0.5, 1.0}

    assert main(search(folder, "--resume")) == 0
    captured = capsys.readouterr()
    assert "was finished before" in captured.out
    assert captured.err == ""
    assert Schedule.load(folder / "schedule.json") == schedule
    assert "holds a search already" in fails(search(folder), capsys)
    assert "seed: 0 then, 1 now" in fails(search(folder, "--resume", "--seed", "1"), capsys)


def test_search_for_several_targets(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "search"
    argv = search(folder, "--gflops", "0.25", "0.15", "--tensorboard")
    from diffrate_ext.rates import RateSearch

    gflops, calls = RateSearch.gflops, []

    def interrupt_in_the_second(self):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return gflops(self)

    with monkeypatch.context() as patch:
        patch.setattr(RateSearch, "gflops", interrupt_in_the_second)
        assert main(argv) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("diffrate: search stopped after step 1 of 2")
    assert "--resume" in error
    first = (folder / "0.25G" / "checkpoint.pt").stat().st_mtime_ns

    assert main([*argv, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "0.25 GFLOPs, was finished before" in output
    assert "0.15 GFLOPs, resumed after step 1" in output
    assert (folder / "0.25G" / "checkpoint.pt").stat().st_mtime_ns == first
    for target in (0.25, 0.15):
        schedule = Schedule.load(folder / f"{target}G" / "schedule.json")
        assert schedule.gflops(embedded.build_model()) == pytest.approx(target, rel=0.01)
        assert list((folder / f"{target}G" / "tensorboard").iterdir())


def test_search_on_the_users_pictures(labelled, tmp_path, capsys):
    folder = tmp_path / "search"
    argv = search(folder, *TEST_VIT, "--images", str(labelled), "--gflops", "0.025", "--lr", "0.2")
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "accuracy" in captured.err
    assert len(Schedule.load(folder / "schedule.json")) == 6
    # random weights and a seed: the same again
    again = search(tmp_path / "again", *argv[9:])
    assert main(again) == 0
    assert (tmp_path / "again" / "history.json").read_text() == (folder / "history.json").read_text()


def test_search_passes_its_options_on(tmp_path, monkeypatch):
    from diffrate_ext import searching
    from diffrate_ext.images import sampling

    seen = {}

    def loader(source, model, **options):
        seen.update(options, where=source.where, labelled=source.labelled)
        return []

    def run(model, loader, gflops, settings, **options):
        seen.update(gflops=gflops, settings=settings, resume=options["resume"], facts=options["facts"])
        loader(3)
        raise ValueError("enough")

    monkeypatch.setattr(sampling, "search_loader", loader)
    monkeypatch.setattr(searching, "run_search", run)
    words = "search --gflops 0.2 --steps 7 --batch-size 6 --lr 0.5 --min-lr 0.1 --weight-decay 0.01 --flops-weight 3 "
    words += "--flops-loss absolute --warmup-steps 2 --amp --granularity 4 --mixup 0.3 --cutmix 0.4 "
    words += "--no-soft-targets --label-smoothing 0.2 --augment --workers 2 --seed 9 --split test --resume"
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert seen["gflops"] == 0.2
    assert seen["settings"] == searching.SearchSettings(
        steps=7,
        lr=0.5,
        min_lr=0.1,
        weight_decay=0.01,
        flops_weight=3,
        flops_loss="absolute",
        warmup_steps=2,
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
        assert fact in seen["facts"]
    assert main(["search", "--soft-targets"]) == 2
    assert seen["settings"] == searching.SearchSettings(steps=100, soft_targets=True)
    assert (seen["mixup"], seen["cutmix"], seen["smoothing"], seen["labelled"]) == (0, 0, 0, False)
    assert seen["gflops"] == pytest.approx(0.6 * 0.3509, rel=1e-3)


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


def test_evaluate(labelled, capsys):
    argv = ["evaluate", *TEST_VIT, "--images", str(labelled), "--workers", "0", "--batch-size", "3"]
    assert main([*argv, "--gflops", "0.03", "0.02"]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert list(table) == ["uncompressed", "0.03 GFLOPs", "0.02 GFLOPs"]
    assert [float(row[0]) for row in table.values()] == pytest.approx([0.03768, 0.03, 0.02], rel=0.02)
    for _, top1, loss, agreement, speed, speed_up in table.values():
        assert all(re.fullmatch(r"\d+\.\d\d%", share) for share in (top1, agreement))
        assert float(loss) > 0
        assert float(speed) > 0
        assert re.fullmatch(r"\d+\.\d\dx", speed_up)
    assert table["uncompressed"][3] == "100.00%"
    assert "4 images" in captured.out


def test_evaluate_as_json_finds_what_the_library_finds(labelled, tmp_path, capsys):
    import timm
    import torch

    from diffrate_ext.images.sampling import evaluation_loader
    from diffrate_ext.images.sources import match_classes, open_images

    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    schedule = Schedule.uniform(model, 0.02)
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
    assert content["results"][1]["gflops"] == schedule.gflops(model)


def test_evaluate_without_labels(folder, capsys):
    argv = ["evaluate", *TEST_VIT, "--images", str(folder), "--workers", "0", "--gflops", "0.02", "--amp"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert {(row[1], row[2]) for row in table.values()} == {("-", "-")}
    assert "3 images" in captured.out
    assert "broken.jpg" in captured.err


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.keys() == {"version", *diffrate_ext.build_info()}


def test_info_as_a_table(capsys, monkeypatch):
    built = {"compiler": "g++ 12", "simd_compiled": ["avx2", "avx512"], "cuda_architectures": [], "threads": 2}
    monkeypatch.setattr(diffrate_ext, "build_info", lambda: built, raising=False)
    assert main(["info"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["compiler"] == ["g++ 12"]
    assert table["simd compiled"] == ["avx2, avx512"]
    assert table["cuda architectures"] == ["none"]
    assert table["threads"] == ["2"]


def test_version_and_help(capsys):
    for argv, expected in (
        (["--version"], "diffrate_ext "),
        (["--help"], "demo"),
        (["demo", "--help"], "--images PATH"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, diffrate_ext.cli.main as cli; cli.build_parser().format_help(); "
        "print({'timm', 'matplotlib', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffrate_ext", "demo", "--nonsense"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == "diffrate: error: unrecognized arguments: --nonsense (see diffrate --help)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--n-images", "0"], "at least 1, got '0'"),
        (["demo", "--n-images", "many"], "at least 1, got 'many'"),
        (["demo", "--n-images", "2001"], "1 .. 2000"),
        (["demo", "--images", "."], "--images needs --model"),
        (["demo", "--weights", "x"], "--weights needs --model"),
        (["demo", "--no-pretrained"], "--no-pretrained needs --model"),
        (["demo", "--model", "test_vit"], "--model needs --images"),
        (["demo", *TEST_VIT, "--images", "/no/such/folder"], "/no/such/folder"),
        (["demo", *TEST_VIT, "--weights", "x", "--images", "."], "not allowed with"),
        (["demo", "--gflops", "9"], "9"),
        (["demo", "--gflops", "0.2", "--schedule", "x"], "not allowed with"),
        (["demo", "--schedule", "/no/such/schedule.json"], "/no/such/schedule.json"),
        (["demo", "--output", "/no/such/folder/x.png"], "/no/such/folder"),
        (["demo", "--output", "x.docx"], "x.docx"),
        (["demo", "--device", "abacus"], "abacus"),
        (["search", "--steps", "0"], "at least 1, got '0'"),
        (["search", "--lr", "fast"], "at least 0, got 'fast'"),
        (["search", "--warmup-steps", "-1"], "at least 0, got '-1'"),
        (["search", "--lr", "0.1", "--min-lr", "0.2"], "min_lr must not be above lr"),
        (["search", "--images", "."], "--images needs --model"),
        (["search", *TEST_VIT], "--model needs --images"),
        (["search", *TEST_VIT, "--images", "/no/such/folder"], "/no/such/folder"),
        (["search", "--split", "val"], "'search' and 'test', got 'val'"),
        (["search", "--gflops", "0.2", "9"], "9 GFLOPs cannot be reached: the model takes 0.3509"),
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


def test_schedule_of_another_model(tmp_path, capsys):
    path = tmp_path / "short.json"
    Schedule(prune=[197, 100], merge=[197, 90]).save(path)
    assert "2 blocks" in fails(["benchmark", "--schedule", str(path)], capsys)


def test_out_of_memory_is_an_error_of_one_line(monkeypatch, capsys):
    def exhausted(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("diffrate_ext.timing.random_images", exhausted)
    assert "--batch-size" in fails(["benchmark"], capsys)


def test_bugs_keep_their_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("diffrate_ext.timing.random_images", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["benchmark"])


@pytest.mark.parametrize("command", ["demo", "search", "evaluate", "benchmark", "visualize", "info"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: diffrate {command}" in out
    assert "%" not in out.replace("60%", "")  # what argparse fills in is filled in


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
    Schedule.uniform(timm.create_model("test_vit"), 0.025).save(tmp_path / "schedule.json")
    argv = ["evaluate", *TEST_VIT, "--images", str(tmp_path / "images"), "--workers", "0", "--json"]
    assert main([*argv, "--schedule", str(tmp_path / "schedule.json")]) == 0
    captured = capsys.readouterr()
    assert "agreement only" in captured.err
    found = json.loads(captured.out)["results"]
    assert found[1]["schedule"] == tmp_path.name  # not schedule.json, as every search calls it
    assert found[1]["top1"] is None


def test_resuming_nothing_is_said(tmp_path, capsys):
    argv = search(tmp_path / "nothing", "--steps", "1", "--batch-size", "2", "--resume")
    assert main(argv) == 0
    assert "holds no search yet" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_first(capsys):
    assert "cannot be written" in fails(search(Path("/proc/search")), capsys)
