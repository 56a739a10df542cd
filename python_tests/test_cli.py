"""The command line, in process: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import diffrate_ext
from diffrate_ext import embedded
from diffrate_ext.cli import main
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
    assert main(["demo", *QUICK, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    table = rows(captured.out)
    assert list(table) == ["uncompressed", "80% FLOPs", "65% FLOPs", "50% FLOPs"]
    gflops = [float(row[0]) for row in table.values()]
    assert gflops == pytest.approx([0.351, 0.281, 0.228, 0.175], abs=0.002)
    for _, top1, agreement, speed, speed_up, _ in table.values():
        assert all(re.fullmatch(r"\d+\.\d%", share) for share in (top1, agreement))
        assert float(speed) > 0
        assert re.fullmatch(r"\d+\.\d\dx", speed_up)
    assert [row[5] for row in table.values()] == ["1.00x", "1.25x", "1.54x", "2.00x"]
    assert "16 images" in captured.out
    assert str(output) in captured.out
    assert_is_a_drawing(output)


def test_demo_reports_the_accuracy_that_evaluate_finds(tmp_path, capsys):
    from diffrate_ext.evaluation import evaluate

    images, labels = embedded.load_images("test")
    expected = evaluate(embedded.load_model(), [[embedded.normalize(images[:16]), labels[:16]]]).top1
    assert main(["demo", *QUICK, "--gflops", "0.3", "--output", str(tmp_path / "demo.png")]) == 0
    table = rows(capsys.readouterr().out)
    assert table["uncompressed"][1] == f"{expected:.1%}"
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
        "import sys, diffrate_ext.cli as cli; cli.build_parser().format_help(); "
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
