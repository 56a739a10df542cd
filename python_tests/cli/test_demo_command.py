"""``diffrate demo``, ``visualize``, ``benchmark`` and ``info``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUICK, TEST_VIT, assert_is_a_drawing, rows

import diffrate_ext
from diffrate_ext import InputValueError, embedded
from diffrate_ext.cli.main import main
from diffrate_ext.compression.flops import flops
from diffrate_ext.schedule import Schedule


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
        assert re.fullmatch(r"1\.00x|\d+\.\d\dx ±\d+\.\d\d", speed_up)
    assert [float(row[6][:-1]) for row in table.values()] == pytest.approx([1, 1.667, 1.667], abs=0.02)
    assert "search  step 2/2" in captured.err
    assert "16 images" in captured.out
    assert str(output) in captured.out
    assert_is_a_drawing(output)
    assert f"Learned schedule: {tmp_path / 'demo.json'}" in captured.out
    learned = Schedule.load(tmp_path / "demo.json")
    assert flops(embedded.build_model(), learned) / 1e9 == pytest.approx(0.6 * 0.3509, rel=0.01)


@pytest.mark.parametrize(("options", "steps", "images"), [([], 15, 200), (["--search-steps", "7"], 7, 200)])
def test_a_quick_demo(options, steps, images, tmp_path, monkeypatch):
    seen = []

    def learn(workload, steps, console):
        seen.append((steps, len(workload.images)))
        raise InputValueError("enough")

    monkeypatch.setattr("diffrate_ext.demo.learned_schedule", learn)
    assert main(["demo", "--quick", *options, "--output", str(tmp_path / "demo.png")]) == 2
    assert seen == [(steps, images)]


def test_demo_reports_the_accuracy_that_evaluate_finds(tmp_path, capsys):
    from diffrate_ext.evaluation import evaluate

    images, labels = embedded.load_images("test")
    expected = evaluate(embedded.load_model(), [[embedded.normalize(images[:16]), labels[:16]]]).top1
    assert main(["demo", *QUICK, "--gflops", "0.3", "--output", str(tmp_path / "demo.png")]) == 0
    table = rows(capsys.readouterr().out)
    assert table["uncompressed"][2] == f"{expected:.1%}"
    assert list(table)[1:] == ["uniform 0.3 GFLOPs"]


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
    schedule = Schedule(after_pruning=[197, *[150] * 11], after_merging=[197, *[140] * 11])
    schedule.save(tmp_path / "mine.json")
    argv = ["demo", *QUICK, "--schedule", str(tmp_path / "mine.json"), "--output", str(tmp_path / "demo.png")]
    assert main(argv) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["uncompressed", "mine.json"]
    assert float(table["mine.json"][0]) == pytest.approx(flops(embedded.build_model(), schedule) / 1e9, rel=1e-2)


def test_visualize(tmp_path, capsys):
    output = tmp_path / "tokens.png"
    assert main(["visualize", "--n-images", "2", "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert_is_a_drawing(output)


def test_visualize_a_users_picture(folder, tmp_path):
    output = tmp_path / "tokens.png"
    assert main(["visualize", *TEST_VIT, "--images", str(folder / "a.png"), "--output", str(output)]) == 0
    assert_is_a_drawing(output)


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.keys() == {"version", "GPU", *diffrate_ext.build_info()}


def test_info_as_a_table(capsys, monkeypatch):
    built = {"compiler": "g++ 12", "simd_compiled": ["avx2", "avx512"], "cuda_architectures": [], "threads": 2}
    monkeypatch.setattr(diffrate_ext, "build_info", lambda: built, raising=False)
    assert main(["info"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["compiler"] == ["g++ 12"]
    assert table["simd compiled"] == ["avx2, avx512"]
    assert table["cuda architectures"] == ["none: built without CUDA kernels"]
    assert table["threads"] == ["2"]
    assert table["GPU"] == ["none"]


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
    assert done.stderr == "diffrate: error: unrecognized arguments: --nonsense (see diffrate demo --help)\n"


def test_no_command_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "search" in captured.err
    assert "evaluate" in captured.err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_who_has_enough_is_no_error(options: list[str], tmp_path: Path) -> None:
    """``diffrate info | head -1``, here of a reader that is gone at once."""
    command = [sys.executable, "-m", "diffrate_ext", "info", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
