"""The stages of benchmarks/gpu.sh: what they ask Python for, and that they go on where they stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import run
import sanitize_cases

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


PYTHON_STUB = """#!/bin/sh
# stands for Python on a machine with a GPU: notes what gpu.sh asks for
case "$*" in
*"pip wheel"*) while [ "$1" != -w ]; do shift; done; mkdir -p "$2"; echo a >"$2/a-py3-none-any.whl"; echo wheel ;;
*"pip install"*) echo install ;;
*"-m pytest"*)
    echo test
    while [ "$1" != --passed ]; do shift; done
    echo one_test >>"$2"
    exit "${STATUS:-0}" ;;
*--kernels*) echo kernels ;;
*run.py*) echo "run $*" ;;
esac >>log
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What gpu.sh needs of one, with stubs for Python and the sanitizer."""
    for folder in ("benchmarks/results", "csrc", "diffrate_ext", "python_tests", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "csrc/a.cu", "benchmarks/sanitize_cases.py"):
        (tmp_path / file).write_text("a", encoding="utf-8")
    shutil.copy(BENCHMARKS / "gpu.sh", tmp_path / "benchmarks")
    sanitizer = '#!/bin/sh\necho "sanitizer $2" >>log\necho "117 calls"\nexit "${STATUS:-0}"\n'
    for name, text in (("python", PYTHON_STUB), ("compute-sanitizer", sanitizer)):
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def gpu_stage(checkout: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """The exit status, and what the stubs were asked for."""
    log = checkout / "log"
    log.unlink(missing_ok=True)
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", **environment}
    command = ["sh", str(checkout / "benchmarks" / "gpu.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, log.read_text(encoding="utf-8").splitlines() if log.exists() else [done.stderr]


def test_a_stage_builds_once(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert gpu_stage(checkout, "build") == (0, ["wheel", "install"])
    assert gpu_stage(checkout, "build") == (0, ["install"])
    (checkout / "csrc" / "a.cu").write_text("b", encoding="utf-8")
    out = tmp_path_factory.mktemp("out")
    assert gpu_stage(checkout, "build", OUT=str(out)) == (0, ["wheel", "install"])
    (wheel,) = out.glob("wheel-*/*.whl")
    assert (checkout / "build" / "gpu" / wheel.relative_to(out)).exists()


def test_a_stage_goes_on_where_the_last_call_ended(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = (tmp_path_factory.mktemp("out") for _ in range(2))
    assert gpu_stage(checkout, "test", OUT=str(first), STATUS="1")[0] == 1
    (passed,) = first.glob("passed-*.txt")
    assert not (first / "cuda_test.md").exists()
    shutil.copy(passed, checkout / "build" / "gpu")  # as the session that called brings it back
    assert gpu_stage(checkout, "test", OUT=str(second)) == (0, ["install", "test"])
    assert (second / passed.name).read_text(encoding="utf-8") == "one_test\n" * 2
    assert "2 tests passed on the GPU" in (second / "cuda_test.md").read_text(encoding="utf-8")


def test_no_test_at_all_is_no_success(checkout: Path) -> None:
    stub = checkout / "bin" / "python"
    stub.write_text(PYTHON_STUB.replace("echo one_test", "printf ''"), encoding="utf-8")
    assert gpu_stage(checkout, "test", STATUS="5")[0] == 5
    assert gpu_stage(checkout, "test")[0] == 1


def test_sanitizing_stops_at_what_it_finds_and_goes_on_there(checkout: Path) -> None:
    assert gpu_stage(checkout, "sanitize", STATUS="1") == (1, ["wheel", "install", "kernels", "sanitizer memcheck"])
    status, asked = gpu_stage(checkout, "sanitize")
    assert (status, asked[2:]) == (0, [f"sanitizer {tool}" for tool in ("memcheck", "racecheck", "synccheck")])
    page = (checkout / "benchmarks" / "results" / "cuda_sanitize.md").read_text(encoding="utf-8")
    assert "- racecheck found nothing: 117 calls" in page
    assert gpu_stage(checkout, "sanitize") == (0, ["install", "kernels"])
    (checkout / "bin" / "compute-sanitizer").unlink()
    if not shutil.which("compute-sanitizer") and not list(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")):
        assert gpu_stage(checkout, "sanitize")[0] == 1


@pytest.mark.parametrize(("stage", "runs"), [("operators", 2), ("models", 2), ("search", 1)])
def test_results_are_written_where_they_are_kept(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, stage: str, runs: int
) -> None:
    out = tmp_path_factory.mktemp("out")
    part = {"operators": "ops"}.get(stage, stage)
    (checkout / "benchmarks" / "results" / f"cuda_{part}.json").write_text("{}", encoding="utf-8")
    status, asked = gpu_stage(checkout, stage, OUT=str(out))
    assert status == 0
    assert len(asked) == 2 + runs
    assert (out / f"cuda_{part}.json").exists()  # to go on with
    for line in asked[2:]:
        arguments = run.parse(line.split()[2:])
        assert (arguments.only, arguments.device, arguments.output) == (part, "cuda", out)
        assert arguments.resume
        assert (checkout / "build" / "gpu" / f"wheel-{arguments.sources}").exists()
    assert gpu_stage(checkout, stage)[1][-1].startswith("run ")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="gpu.sh needs Python 3.11")
def test_a_machine_without_a_gpu_is_told(checkout: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    status, (message,) = gpu_stage(checkout, "operators", PYTHON=sys.executable)
    assert status == 1
    assert message == "torch sees no CUDA device\n"
    assert run.main(["--device", "cuda"]) == 2


def test_tests_that_passed_are_not_run_again(tmp_path: Path) -> None:
    test = "import pathlib\ndef test_a(): pass\ndef test_b(): assert pathlib.Path('there').exists()\n"
    (tmp_path / "test_two.py").write_text(test, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "python_tests")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "passed_tests", "-p", "no:cacheprovider"]

    def outcome() -> str:
        arguments = [*command, "--passed", "passed", "."]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[-1]

    assert outcome().startswith("1 failed, 1 passed")
    assert (tmp_path / "passed").read_text(encoding="utf-8") == "test_two.py::test_a\n"
    (tmp_path / "there").touch()
    assert outcome().startswith("1 passed, 1 deselected")
    assert outcome().startswith("2 deselected")


def test_sanitizer_cases_call_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name.partition(",")[0] for name, _ in sanitize_cases.cases(CPU, torch.float32, 17, 32)}
    assert names == set(run.OPERATORS)
    monkeypatch.setattr(
        sanitize_cases, "cases", lambda *_: [("one", lambda: (torch.ones(2, requires_grad=True) * 2,)), ("two", tuple)]
    )
    assert sanitize_cases.run_all(CPU) == 2 * 9
