"""A run of the benchmarks: it goes on after failures, and its pages say what was measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import cases
import checks
import harness
import machine
import pytest
import report
import run
import torch

BENCHMARKS = Path(run.__file__).parent


class RestartedError(Exception):
    """Instead of a new process."""


def restart() -> NoReturn:
    raise RestartedError


MACHINE = {"cpu": "a CPU", "threads": 1, "date": "today", "load_average": 0, "torch": "2", "timm": "1", "python": "3",
           "diffrate_ext": {}}  # fmt: skip


def fake_job(log: list[int], number: int, error: Exception | None = None, lost: str | None = None) -> run.Job:
    def do() -> dict[str, Any]:
        log.append(number)
        if error is not None:
            raise error
        unavailable = {f"{cases.OURS}, {harness.GRAPH}": lost} if lost else {}
        return {"model": "m", "batch": number, "seconds": {}, "ratio": {}, "peak_bytes": {}, "bars": [],
                "unavailable": unavailable}  # fmt: skip

    return {"model": "m", "batch": number}, do


def test_a_run_goes_on_after_failures(tmp_path: Path) -> None:
    log: list[int] = []
    path = tmp_path / "cuda_search.json"
    wrong, crash = checks.WrongResultError("by far"), RuntimeError("CUDA error\nmore")
    jobs = [
        fake_job(log, 0),
        fake_job(log, 1, wrong),
        fake_job(log, 2, crash),
        fake_job(log, 3, lost="waits"),
        fake_job(log, 4),
    ]

    def results(**options: bool) -> report.Results:
        return report.Results(path, MACHINE, **options)

    with pytest.raises(RestartedError):  # an error of the device, but not a wrong result
        run.work(jobs, results(resume=False), restart)
    assert log == [0, 1, 2]
    assert [r["batch"] for r in json.loads(path.read_text(encoding="utf-8"))["records"]] == [0]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "**Failed**: m, 1, WrongResultError: by far" in page
    assert "**Failed**: m, 2, RuntimeError: CUDA error\n" in page

    with pytest.raises(RestartedError):  # a failed capture; what failed is not tried again
        run.work(jobs, results(resume=True, restart=True), restart)
    assert log == [0, 1, 2, 3]
    run.work(jobs, results(resume=True, restart=True), restart)
    assert log == [0, 1, 2, 3, 4]

    with pytest.raises(RestartedError):  # but by the next run
        run.work(jobs, results(resume=True), restart)
    assert log == [0, 1, 2, 3, 4, 1, 2]
    run.work(jobs, results(resume=False), None)
    assert log[7:] == [0, 1, 2, 3, 4]
    assert len(results(resume=True).records) == 3
    assert report.Results(path, {**MACHINE, "commit": "another"}, resume=True).records == []


def test_a_failed_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def jobs(*_: Any) -> list[run.Job]:
        return [fake_job([], 1), fake_job([], 2, checks.WrongResultError("by far"))]

    monkeypatch.setattr(run, "search_jobs", jobs)
    assert run.main(["--only", "search", "--output", str(tmp_path)]) == 1
    assert "FAILED: WrongResultError: by far" in capsys.readouterr().err
    monkeypatch.setattr(run, "search_jobs", lambda *_: jobs()[:1])
    assert run.main(["--only", "search", "--output", str(tmp_path)]) == 0


def test_a_restart_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "ops", "--dtype", "bfloat16"])
    run.restart(tmp_path)
    (executable, command), = called  # fmt: skip
    assert executable == command[0] == sys.executable
    arguments = run.parse(command[2:])
    assert (arguments.only, arguments.dtype, arguments.output) == ("ops", "bfloat16", tmp_path)
    assert arguments.resume
    assert arguments.restarted


def test_results_say_which_commit_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{7,}\+?", found)  # None in a source archive
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert machine.commit() is None

    assert report.machine_line(MACHINE).endswith("Python 3.\n\ndiffrate_ext build: `{}`")
    line = report.machine_line({**MACHINE, "commit": "0123abc", "remark": "Odd."})
    assert line.endswith("Python 3, commit 0123abc.\n\ndiffrate_ext build: `{}`\n\nOdd.")


def test_index_page_says_what_was_not_measured(tmp_path: Path) -> None:
    page = report.index_page(tmp_path)
    assert "Not yet run on a GPU" in page
    assert page.count("\n- `gpu.sh ") == len(report.ON_A_GPU)
    bars = [cases.Bar("eager", 2).judge({"eager": ratio}) for ratio in (1.0, 2.0, 3.0)]
    record = {"model": "m", "batch": 1, "seconds": {}, "bars": bars}
    content = {"machine": {**MACHINE, "gpu": "a GPU"}, "records": [record]}
    (tmp_path / "cuda_search.json").write_text(json.dumps(content), encoding="utf-8")
    report.rewrite(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not yet run on a GPU" not in page
    assert "a GPU, today, torch 2; 2 of 3 bars and aims reached\n" in page
    assert page.count("\n- `gpu.sh ") == len(report.ON_A_GPU) - 1
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "results.json").write_text(json.dumps({"machine": content["machine"]}), encoding="utf-8")
    for name in report.ON_A_GPU:
        (tmp_path / f"{name}.md").write_text("all passed; a GPU\n\nmore", encoding="utf-8")
    page = report.index_page(tmp_path)
    assert "Unverified" not in page
    assert "\n- [cuda_test](cuda_test.md): all passed; a GPU\n" in page
    assert "[cuda_search](cuda_search.md): a GPU, today" in page
    assert "[paper](paper/README.md): methods and schedules side by side; a GPU, today" in page


def test_committed_pages_are_those_of_the_committed_results(tmp_path: Path) -> None:
    results = BENCHMARKS / "results"
    shutil.copytree(results, tmp_path / "results")
    report.rewrite(tmp_path / "results")
    for path in results.glob("*.md"):
        assert (tmp_path / "results" / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def committed_results() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (BENCHMARKS / "results").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_quick_benchmarks_run(tmp_path: Path) -> None:
    committed = committed_results()
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    operators = json.loads((tmp_path / "cpu_ops.json").read_text(encoding="utf-8"))["records"]
    assert len({record["operator"] for record in operators}) == 11
    assert all("diffrate_ext" in record["relative_error"] for record in operators)
    models = json.loads((tmp_path / "cpu_models.json").read_text(encoding="utf-8"))["records"]
    assert {record["batch"] for record in models} == {1, 4, 16}
    assert committed_results() == committed


def test_only_operators_with_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.Ceilings, "measured", lambda *_: cases.Ceilings(1e9, 1e9))
    settings, names = cases.Settings(torch.device("cpu")), ["sort_tokens", "compression_rate"]
    every, some = ([job.args[0] for _, job in run.operator_jobs(settings, names, bars)] for bars in (False, True))
    assert [case.label for case in some] == [case.label for case in every if case.bars] != []
    assert {case.operator for case in some} <= {case.operator for case in every} == set(names)
    assert len(some) < len(every)


def test_only_models_with_bars() -> None:
    gpu = torch.device("cuda")
    every, some = (
        [job.args[0] for _, job in run.model_jobs(gpu, torch.bfloat16, False, False, bars)] for bars in (False, True)
    )
    assert all(each.bars or each.gains for each in some)
    assert any(each.gains for each in some)  # bars of another kind
    assert any(each.bars and not each.gains for each in some)
    assert some == [each for each in every if each.bars or each.gains]
    none = list(run.model_jobs(gpu, torch.float32, False, False, True))
    assert none == []  # in float32 nothing is to be reached
