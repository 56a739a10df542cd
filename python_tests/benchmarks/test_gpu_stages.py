"""The stages of benchmarks/gpu.sh: what they ask Python for, and what they write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run
import sanitize_cases
import torch

BENCHMARKS = Path(run.__file__).parent
CPU = torch.device("cpu")

PYTHON_STUB = """#!/bin/sh
# stands for Python on a machine with a GPU: notes what gpu.sh asks for
case "$*" in
*machine.py*) echo "a GPU, today" ;;
*get_device_capability*) echo 9.0 ;;
*"pip install"*) echo "install for $TORCH_CUDA_ARCH_LIST" >>log ;;
*build_info*) exit "${NO_KERNELS:-0}" ;;
*"-m pytest"*) echo test >>log; echo "12 of the tests"; exit "${STATUS:-0}" ;;
*--kernels*) echo kernels >>log; echo "one_kernel" ;;
*run.py*) echo "run $*" >>log; exit "${STATUS:-0}" ;;
*tune_*) echo "tune $*" >>log; echo "a table"; echo "a line that sums up"; exit "${STATUS:-0}" ;;
*report.py*) echo report >>log ;;
esac
"""
SANITIZER_STUB = """#!/bin/sh
echo "sanitizer $2" >>log
echo "117 calls"
[ "$2" != "${FINDS:-}" ]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What gpu.sh needs of one, with stubs for Python and the sanitizer."""
    for folder in ("benchmarks", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(BENCHMARKS / "gpu.sh", tmp_path / "benchmarks")
    for name, text in (("python", PYTHON_STUB), ("compute-sanitizer", SANITIZER_STUB)):
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def gpu_stages(checkout: Path, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """The exit status, what the stubs were asked for, and what was printed."""
    log = checkout / "log"
    log.unlink(missing_ok=True)
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", **environment}
    command = ["sh", str(checkout / "benchmarks" / "gpu.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    asked = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return done.returncode, asked, done.stdout + done.stderr


def page(checkout: Path, name: str) -> str:
    return (checkout / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("build", "nonsense"), ("--resume",), ("--output",)])
def test_usage(checkout: Path, arguments: tuple[str, ...]) -> None:
    status, asked, printed = gpu_stages(checkout, *arguments)
    assert (status, asked) == (2, [])
    if arguments != ("--output",):
        assert printed.startswith("usage: sh benchmarks/gpu.sh [--resume] [--output FOLDER] STAGE...\n")
        assert all(
            f"\n  {stage} " in printed
            for stage in ("build", "test", "sanitize", "operators", "models", "search", "bars", "tune")
        )
        assert printed.endswith("CUDA toolkit.\n")
    assert not (checkout / "benchmarks" / "results").exists()


def test_stages_follow_each_other(checkout: Path) -> None:
    status, asked, _ = gpu_stages(checkout, "build", "test", "search")
    assert status == 0
    assert [line.partition(" benchmarks")[0] for line in asked] == ["install for 9.0", "test", "run", "report"]
    assert gpu_stages(checkout, "build", TORCH_CUDA_ARCH_LIST="8.0+PTX")[1][0] == "install for 8.0+PTX"


def test_a_package_without_kernels_is_told(checkout: Path) -> None:
    status, asked, _ = gpu_stages(checkout, "test", NO_KERNELS="1")
    assert (status, asked) == (1, [])


def test_tests_that_pass_are_a_page(checkout: Path) -> None:
    assert gpu_stages(checkout, "test")[0] == 0
    assert page(checkout, "cuda_test") == "all tests passed; a GPU, today\n\n12 of the tests\n"


def test_tests_that_fail_are_shown(checkout: Path) -> None:
    status, asked, printed = gpu_stages(checkout, "test", "search", STATUS="1")
    assert (status, asked) == (1, ["test"])
    assert "12 of the tests" in printed
    assert not (checkout / "benchmarks" / "results" / "cuda_test.md").exists()


def test_sanitizing_stops_at_what_it_finds(checkout: Path) -> None:
    tools = ("memcheck", "racecheck", "synccheck")
    status, asked, printed = gpu_stages(checkout, "sanitize", FINDS="racecheck")
    assert (status, asked) == (1, ["kernels", "sanitizer memcheck", "sanitizer racecheck"])
    assert printed.endswith("117 calls\n")
    assert not (checkout / "benchmarks" / "results" / "cuda_racecheck.md").exists()
    status, asked, _ = gpu_stages(checkout, "sanitize")
    assert (status, asked) == (0, ["kernels", *(f"sanitizer {tool}" for tool in tools), "report"])
    for tool in tools:
        assert page(checkout, f"cuda_{tool}") == "nothing found in 117 calls; a GPU, today\n\n    one_kernel\n"


def test_a_missing_sanitizer_is_no_success(checkout: Path) -> None:
    (checkout / "bin" / "compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer") or Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("a sanitizer")
    status, _, printed = gpu_stages(checkout, "sanitize")
    assert status == 1
    assert "compute-sanitizer" in printed


@pytest.mark.parametrize(
    ("stage", "part", "runs"), [("operators", "ops", 2), ("models", "models", 2), ("search", "search", 1)]
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_measured(checkout: Path, tmp_path: Path, stage: str, part: str, runs: int, resume: bool) -> None:
    output = tmp_path / "elsewhere" if resume else checkout / "benchmarks" / "results"
    options = ["--resume", "--output", str(output)] if resume else []
    status, asked, _ = gpu_stages(checkout, *options, stage)
    assert status == 0
    assert len(asked) == runs + 1
    dtypes = set()
    for line in asked[:runs]:
        arguments = run.parse(line.split()[2:])
        assert (arguments.only, arguments.device, arguments.output) == (part, "cuda", output)
        assert arguments.resume is resume
        dtypes.add(arguments.dtype)
    assert dtypes == ({"float32"} if runs == 1 else {"bfloat16", "float32"})


def test_what_fails_is_no_success_but_the_rest_is_measured(checkout: Path) -> None:
    status, asked, _ = gpu_stages(checkout, "operators", "search", STATUS="1")
    assert status == 1
    assert [line.partition(" ")[0] for line in asked] == ["run", "run", "run", "report"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_a_machine_without_a_gpu_is_told() -> None:
    command = ["sh", str(BENCHMARKS / "gpu.sh"), "operators"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "torch sees no CUDA device\n"
    assert run.main(["--device", "cuda"]) == 2


def test_sanitizer_cases_call_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name.partition(",")[0] for name, _ in sanitize_cases.cases(CPU, torch.float32, 17, 32)}
    assert names == set(run.OPERATORS)
    monkeypatch.setattr(
        sanitize_cases, "cases", lambda *_: [("one", lambda: (torch.ones(2, requires_grad=True) * 2,)), ("two", tuple)]
    )
    assert sanitize_cases.run_all(CPU) == 2 * 9


def test_sanitizer_cases_run() -> None:
    cases = list(sanitize_cases.cases(CPU, torch.float32, 17, 32))
    assert sanitize_cases.run_all(CPU) == 9 * len(cases)


def test_variants_are_a_page_each(checkout: Path) -> None:
    status, asked, _ = gpu_stages(checkout, "tune")
    assert status == 0
    scripts = [f"benchmarks/tune_{kernel}.py" for kernel in ("attention", "prune_merge")]
    assert asked == [*(f"tune {script}" for script in scripts), "report"]
    for script in scripts:
        assert (BENCHMARKS.parent / script).exists()
        name = f"cuda_{Path(script).stem}"
        summary = f"every way to run {name.removeprefix('cuda_tune_')}, at each shape; a GPU, today"
        assert page(checkout, name) == f"{summary}\n\n    a table\n    a line that sums up\n"


def test_bars_alone(checkout: Path) -> None:
    assert gpu_stages(checkout, "bars")[0] == 0
    asked = [run.parse(line.split()[2:]) for line in gpu_stages(checkout, "bars")[1][:2]]
    assert [(arguments.only, arguments.bars, arguments.dtype) for arguments in asked] == [
        ("ops", True, "bfloat16"),
        ("models", True, "bfloat16"),
    ]
