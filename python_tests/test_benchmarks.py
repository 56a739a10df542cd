"""The benchmarks: rivals equal the reference, checks reject wrong results, the quick form runs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from diffrate_ext import Schedule, reference
from diffrate_ext.embedded import build_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import cases
import checks
import harness
import models
import report
import rival_model
import rivals
import run
import search_step

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


def draw(batch: int = 2, tokens: int = 33, channels: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, importance, size, residual in float64, so that no two choices tie."""
    generator = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, batch, tokens, channels, generator=generator, dtype=torch.float64)
    importance = torch.rand(batch, tokens - 1, generator=generator, dtype=torch.float64)
    size = 1 + 3 * torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
    return x, importance, size, residual


def draw_qkv() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=generator, dtype=torch.float64)
    return q, k, v, 1 + torch.rand(2, 17, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rival", [rivals.sort_tokens, rivals.sort_tokens_tuned])
@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_sort_tokens_equals_reference(rival: Callable[..., Any], with_size: bool, prefix: int) -> None:
    x, importance, size, _ = draw()
    arguments = (x, importance[:, : 33 - prefix], size if with_size else None)
    if prefix == 0:
        arguments = (x[:, :32], importance, size[:, :32] if with_size else None)
    for actual, expected in zip(
        rival(*arguments, prefix=prefix), reference.sort_tokens(*arguments, prefix=prefix), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rival", [rivals.prune_merge, rivals.prune_merge_tuned])
@pytest.mark.parametrize(
    ("k_p", "k_m", "options"),
    [
        (25, 20, {}),
        (33, 2, {}),
        (33, 33, {}),
        (1, 1, {}),
        (25, 20, {"features": "weighted", "sizes": "sum"}),
        (25, 20, {"residual": True}),
        (25, 20, {"size": None, "residual": True}),
        (25, 20, {"prefix": 4}),
    ],
)
def test_prune_merge_equals_reference(rival: Callable[..., Any], k_p: int, k_m: int, options: dict[str, Any]) -> None:
    x, importance, size, residual = draw()
    options = dict(options)
    sizes = options.pop("size", size)
    if options.get("residual"):
        options["residual"] = residual
    importance = importance[:, : 33 - options.get("prefix", 1)]
    out = rival(x, importance, k_p, k_m, sizes, **options)
    expected = reference.prune_merge(x, importance, k_p, k_m, sizes, **options)
    assert torch.equal(out[2], expected[2])
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1], expected[1])


@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("rival", [rivals.prune_merge, rivals.prune_merge_tuned])
def test_prune_merge_reads_importance_off_a_map(rival: Callable[..., Any], importance: str) -> None:
    x, _, size, _ = draw(tokens=17)
    q, k, _, _ = draw_qkv()
    attn = reference.attention_map(q, k, None, None)
    slot = rival(x, attn, 14, 10, size, importance=importance)[2]
    assert torch.equal(slot, reference.prune_merge(x, attn, 14, 10, size, importance=importance)[2])


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_reduce_equals_reference(weighted: bool) -> None:
    x, _, size, _ = draw()
    dst = torch.randint(-1, 9, (2, 33), generator=torch.Generator().manual_seed(0))
    weights = size if weighted else None
    expected = reference.merge_reduce(x, dst, 10, weights=weights)
    torch.testing.assert_close(rivals.merge_reduce(x, dst, 10, weights=weights), expected)


@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_rivals_equal_reference(with_size: bool, scale: float | None) -> None:
    q, k, v, size = draw_qkv()
    sizes = size if with_size else None
    for name, arguments in (("class_attention", (q, k)), ("received_attention", (q, k)),
                            ("proportional_attention", (q, k, v))):  # fmt: skip
        actual = getattr(rivals, name)(*arguments, sizes, scale=scale)
        expected = getattr(reference, name)(*arguments, sizes, scale=scale)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("importance", ["class", "received"])
def test_masked_attention_equals_reference(importance: str) -> None:
    q, k, v, size = draw_qkv()
    mask = (torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.6).double()
    mask[:, 0] = 1
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, mask)]
    results = []
    for module in (rivals, reference):
        out, measured = module.masked_attention(*leaves, size, scale=0.7, importance=importance)
        results.append([out, measured, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rival", [rivals.compression_rate, rivals.compression_rate_loop])
@pytest.mark.parametrize(("granularity", "prefix"), [(1, 1), (5, 0), (40, 2)])
def test_compression_rate_equals_reference(rival: Callable[..., Any], granularity: int, prefix: int) -> None:
    candidates = len(range(16, 0, -granularity))
    logits = torch.randn(3, candidates, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    results = []
    for function in (rival, reference.compression_rate):
        kept, keep_prob = function(logits, 16, granularity, prefix)
        (gradient,) = torch.autograd.grad(kept.sum() + keep_prob.square().sum(), logits)
        results.append([kept, keep_prob, gradient])
    torch.testing.assert_close(*results)


def draw_search_step() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of x and mask, and the arguments of masked_prune_merge; three tokens are masked already."""
    x, importance, size, grad_x = draw()
    mask = (torch.arange(33) < 30).double().repeat(2, 1)
    probabilities = torch.rand(2, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([25.0, 20.0], dtype=torch.float64)
    arguments = [x, mask, importance + mask[:, 1:], size - 1, *probabilities, *kept]
    return [grad_x, probabilities.clone()], arguments


def step(function: Callable[..., Any], gradients: list[Tensor], arguments: list[Tensor]) -> list[Tensor]:
    leaves = [arguments[index].detach().requires_grad_() for index in (0, 1, 4, 5)]
    results = function(*leaves[:2], *arguments[2:4], *leaves[2:], *arguments[6:])
    found = torch.autograd.grad(results[:2], leaves, gradients, allow_unused=True)
    return [*(result.detach() for result in results), *(leaves[0] * 0 if g is None else g for g in found)]


@pytest.mark.parametrize(("kept_p", "kept_m"), [(25.0, 20.0), (33.0, 20.0), (25.0, 25.0), (20.0, 25.0)])
@pytest.mark.parametrize("sizes", ["cosine", "sum"])
def test_masked_prune_merge_equals_reference(kept_p: float, kept_m: float, sizes: str) -> None:
    gradients, arguments = draw_search_step()
    arguments[6:] = torch.tensor([kept_p, kept_m]).unbind()
    results = []
    for module in (rivals, reference):
        results.append(step(partial(module.masked_prune_merge, sizes=sizes), gradients, arguments))
    torch.testing.assert_close(*results)


def test_the_check_of_a_search_step_rejects_wrong_results() -> None:
    gradients, arguments = ([tensor.float() for tensor in tensors] for tensors in draw_search_step())
    right = step(reference.masked_prune_merge, gradients, arguments)
    checks.check_masked_prune_merge(tuple(right), *gradients, *arguments)
    for index in range(9):
        wrong = list(right)
        wrong[index] = right[index].flip(1) if right[index].dtype == torch.int64 else right[index] * 1.001
        with pytest.raises(checks.WrongResultError):
            checks.check_masked_prune_merge(tuple(wrong), *gradients, *arguments)
    wrong = list(right)
    wrong[4] = torch.where(right[4] == torch.arange(33), right[4], right[4] % 19 + 1)  # other destinations
    with pytest.raises(checks.WrongResultError, match="misses the best cosine"):
        checks.check_masked_prune_merge(tuple(wrong), *gradients, *arguments)


def test_a_bar_is_met_by_what_reaches_it() -> None:
    bar = cases.Bar("eager", 3)
    assert not bar.judge({"eager": 2.99, "other": 5})["met"]
    assert bar.judge({"eager": 3.0})["met"]
    assert bar.judge({"other": 5}) == {"rival": "eager", "kind": "bar", "needed": 3, "reached": 0.0, "met": False}


@pytest.mark.parametrize(
    ("bar", "reached", "words"),
    [
        (cases.Bar("eager", 10), 12.0, ">= 10x as fast | 12.000x | **pass**"),
        (cases.Bar(cases.FLOOR, 1 / 2), 0.4, "at most 2x its time | 2.50x | **MISS**"),
        (cases.Bar(f"eager{cases.PEAK_MEMORY}", 3), 4.0, "at most 1/3 | 1/4.00 | **pass**"),
        (cases.Bar("eager", 10), 0.0, "10 | not measured | **MISS**"),
    ],
)
def test_bars_are_reported(bar: cases.Bar, reached: float, words: str) -> None:
    record = {"operator": "sort_tokens", "case": "small", "bars": [bar.judge({bar.rival: reached} if reached else {})]}
    assert report.bars_table([record]).splitlines()[2] == f"| sort_tokens | small | bar | {bar.rival} | {words} |"


def small_case(ours: Callable[..., Any], **changes: Any) -> cases.Case:
    """Adds two tensors of 1,000 numbers; eager takes three times the memory."""

    def eager(a: Tensor, b: Tensor) -> Tensor:
        return (a + 1) + (b - 1)

    def check(actual: Tensor, a: Tensor, b: Tensor) -> float:
        return checks.check_close("sum", actual, a + b, a.double() + b.double(), a.dtype)

    return cases.Case(
        **{
            "operator": "sum",
            "label": "small",
            "shape": cases.Shape("ViT-S", 1, 384, 6),
            "ours": ours,
            "rivals": {cases.EAGER: eager},
            "make_inputs": lambda: (torch.randn(1000), torch.randn(1000)),
            "check": check,
            "moved": 12_000,
            "operations": 1000,
            **changes,
        }
    )


CEILINGS = cases.Ceilings(bandwidth=1e9, rate=1e12)
QUICK = cases.Settings(CPU, quick=True)


def test_a_record_judges_time_floor_and_memory() -> None:
    memory = [f"eager{cases.PEAK_MEMORY}", f"eager, beyond results{cases.PEAK_MEMORY}"]
    bars = tuple(cases.Bar(rival, 1e-9) for rival in (cases.EAGER, cases.FLOOR, *memory))
    record = cases.run_case(small_case(torch.add, bars=bars), QUICK, CEILINGS)
    assert record["floor"]["seconds"] == 12e-6
    assert record["floor"]["limited_by"] == "memory"
    reached = {bar["rival"]: bar["reached"] for bar in record["bars"]}
    assert reached[cases.FLOOR] == 12e-6 / record["seconds"][cases.OURS]["median"]
    assert reached[cases.EAGER] == record["ratio"][cases.EAGER]["median"]
    assert reached[memory[0]] == 3
    assert reached[memory[1]] == 2 * 4000  # ours takes nothing beyond its result, which counts as a byte
    assert cases.result_bytes((torch.zeros(3), [1], torch.zeros(2, 2, dtype=torch.int64))) == 3 * 4 + 4 * 8
    assert "| sum | small | " in report.operators_table([record])


def test_what_is_never_written_is_noticed() -> None:
    def forgets_to_write(a: Tensor, b: Tensor) -> Tensor:
        """Its memory held the right sum before, unless somebody put something else there."""
        memory = torch.empty_like(a)
        return torch.where(memory.isnan(), memory, a + b)

    with pytest.raises(checks.WrongResultError, match="sum, small, diffrate_ext"):
        cases.run_case(small_case(forgets_to_write), QUICK, CEILINGS)
    assert not torch.are_deterministic_algorithms_enabled()


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> cases.Settings:
    """Settings that take the CPU for a GPU whose graphs are calls."""
    monkeypatch.setattr(cases.Settings, "on_gpu", True)
    monkeypatch.setattr(cases, "captured", lambda call: (call, None))
    return cases.Settings(CPU, torch.bfloat16, quick=True)


def test_graphs_are_timed_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = on_a_gpu(monkeypatch)
    calls = []

    def ours(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a)
        return a + b

    def measure(contenders: dict[str, Callable[..., Any]], inputs: Any, **_: Any) -> harness.Timings:
        for call in contenders.values():
            call(*inputs[0])
        return harness.Timings({name: [8.0, 8.0, 8.0] for name in contenders})

    monkeypatch.setattr(cases, "measure", measure)

    bars = cases.Bar(cases.FLOOR, 1e-9), cases.Bar(f"{cases.EAGER}, {harness.GRAPH}", 1e-9)
    record = cases.run_case(small_case(ours, bars=bars), settings, CEILINGS)
    graph = f"{cases.OURS}, {harness.GRAPH}"
    assert set(record["seconds"]) == {cases.OURS, cases.EAGER, graph, f"{cases.EAGER}, {harness.GRAPH}"}
    assert len({id(a) for a in calls[-4:]}) == 4  # one pass is one call on each set of inputs
    assert record["seconds"][cases.OURS]["median"] == 8.0
    assert record["seconds"][graph]["median"] == 2.0
    assert record["bars"][0]["reached"] == 12e-6 / record["seconds"][graph]["median"]
    assert record["bars"][1]["reached"] == record["ratio"][f"{cases.EAGER}, {harness.GRAPH}"]["median"]
    assert "CUDA graph: " in report.operators_table([record])

    record = cases.run_case(small_case(ours, trains=True), settings, CEILINGS)
    assert set(record["seconds"]) == {cases.OURS, cases.EAGER, graph}


def test_no_capture_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = on_a_gpu(monkeypatch)
    monkeypatch.setattr(cases, "captured", lambda call: (None, "it waits"))
    record = cases.run_case(small_case(torch.add, bars=(cases.Bar(cases.FLOOR, 1e-9),)), settings, CEILINGS)
    assert record["unavailable"] == {f"{cases.OURS}, {harness.GRAPH}": "it waits"}
    assert record["bars"][0]["reached"] == 12e-6 / record["seconds"][cases.OURS]["median"]  # without a graph, as it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", run.OPERATORS)
def test_cases_of_a_gpu_run(monkeypatch: pytest.MonkeyPatch, operator: str, dtype: torch.dtype) -> None:
    """Its checks accept our operators and the rivals, forward and backward."""
    on_a_gpu(monkeypatch)
    module = importlib.import_module(f"ops.bench_{operator}")
    found = list(module.cases(cases.Settings(CPU, dtype, quick=True)))
    assert [case.operator for case in found] == [operator] * len(found)
    assert found or (operator, dtype) == ("compression_rate", torch.bfloat16)
    for case in found:
        if case.shape.batch == 1 or case.trains:
            torch.manual_seed(0)
            inputs = case.make_inputs()
            with torch.enable_grad() if case.trains else torch.inference_mode():
                for name, call in {cases.OURS: case.ours, **case.rivals}.items():
                    cases.checked(case, name, call, inputs)


def test_bars_of_a_gpu_run() -> None:
    settings = cases.Settings(torch.device("cuda"), torch.bfloat16)

    def bars(operator: str) -> dict[str, list[tuple[str, float]]]:
        found = importlib.import_module(f"ops.bench_{operator}").cases(settings)
        return {case.label: [(bar.rival, bar.ratio) for bar in case.bars] for case in found}

    wanted = [("floor", 1 / 2), ("eager", 10), ("eager tuned", 10)]
    merging = bars("prune_merge")
    assert merging.pop("ViT-S batch 256 + residual") == []
    assert merging == {f"ViT-{size} batch 256": wanted for size in "SBLH"}
    attending = bars("proportional_attention")
    assert len(attending) == 6
    assert all(found == [("fused attention alone, CUDA graph", 1 / 1.1)] for found in attending.values())
    assert bars("masked_attention") == {"ViT-S batch 128, with gradients": [("eager", 3), ("eager: peak memory", 3)]}


def test_floor_of_prune_merge_on_a_gpu() -> None:
    """64 MB at C = 384 (issue 4): the tokens that stay or merge in, those that stay out, and little besides."""
    module = importlib.import_module("ops.bench_prune_merge")
    case = next(iter(module.cases(cases.Settings(torch.device("cuda"), torch.bfloat16))))
    tokens = 256 * (168 + 156) * 384 * 2
    assert tokens < case.moved < 1.02 * tokens


def test_plan_of_a_gpu_run() -> None:
    gpu = torch.device("cuda")
    half = models.plan(gpu, torch.bfloat16, quick=False, compile_models=False)
    assert len({tuple(item.key.values()) for item in half}) == len(half) == 4 * 4 + 2
    gains = {item.model.name: item.gains for item in half if item.gains}
    assert gains == {
        model.name: ((0.90, "bar"), (0.95, "aim")) for model in (models.DEIT_B, models.VIT_L, models.VIT_H)
    }
    assert all(item.batch == 256 and item.way == harness.PLAIN for item in half if item.gains)
    alone = {(item.way, bar.ratio) for item in half if item.batch == 1 for bar in item.bars}
    assert alone == {(harness.PLAIN, 1 / 1.1), (harness.GRAPH, 1.0)}
    assert {(item.model, item.batch) for item in half if item.way == harness.COMPILED} == {
        (models.DEIT_B, 256),
        (models.VIT_L, 256),
    }
    full = models.plan(gpu, torch.float32, quick=False, compile_models=False)
    assert {item.model for item in full} == {models.DEIT_S}
    assert not any(item.bars or item.gains for item in full)
    for item in half:  # the schedules are there
        assert len(item.model.schedule) in (12, 24, 32)


def test_realised_gain_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    item = models.Run(models.EMBEDDED, 2, gains=((0.01, "bar"), (100.0, "aim")))
    record = models.run_model(item, CPU, torch.float32, quick=True)
    gain = record["speed_up"][cases.OURS]["median"] / record["flops_ratio"]
    assert [bar["met"] for bar in record["bars"]] == [True, False]
    for bar, needed in zip(record["bars"], (0.01, 100.0), strict=True):
        assert bar["needed"] == pytest.approx(needed * record["flops_ratio"])
        assert bar["reached"] == pytest.approx(gain * record["flops_ratio"], rel=1e-6)
    assert f" {gain:.3f} |" in report.models_table([record])

    images = []

    def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], None]:
        result = call()

        def replay() -> Tensor:
            images.append(call())
            return result.copy_(images[-1])

        return replay, None

    monkeypatch.setattr(models, "captured", captured)
    graph = models.run_model(models.Run(models.EMBEDDED, 1, harness.GRAPH), CPU, torch.float32, quick=True)
    assert graph["relative_error"].keys() == {cases.OURS, cases.EAGER}
    assert set(graph["seconds"]) == {models.UNCOMPRESSED, cases.OURS, cases.EAGER}
    assert graph["peak_bytes"] == {}
    assert "| CUDA graph | diffrate_ext |" in report.models_table([graph])


def test_there_are_no_graphs_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    assert harness.captured(lambda: None) == (None, "no GPU")
    bars = (cases.Bar(models.UNCOMPRESSED, 1.0),)
    record = models.run_model(models.Run(models.EMBEDDED, 1, harness.GRAPH, bars=bars), CPU, torch.float32, quick=True)
    assert record["unavailable"] == {"uncompressed, CUDA graph": "no GPU"}
    assert record["bars"][0]["met"] is False
    assert "no GPU" in report.models_table([record])


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
    assert report.Results(path, {**MACHINE, "sources": "others"}, resume=True).records == []


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


def test_eager_model_equals_the_reference_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = build_model().double().eval()
    images = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    schedule = Schedule.published("ViT-S-DeiT", gflops=2.9)
    keep_all = Schedule([197] * 12, [197] * 12)
    with torch.no_grad():
        before = model(images)
        slow = rival_model.EagerCompressed(
            model, schedule, reference.proportional_attention, reference.prune_merge
        ).eval()(images)
        torch.testing.assert_close(rival_model.compress_eager(model, schedule).eval()(images), slow)
        torch.testing.assert_close(rival_model.compress_eager(model, keep_all).eval()(images), before)
        assert not torch.allclose(slow, before)
        assert torch.equal(model(images), before)


def test_checks_accept_the_reference_and_reject_wrong_results() -> None:
    x, importance, size, _ = (t.float() for t in draw())
    x, size, slot = reference.prune_merge(x, importance, 25, 20, size)
    inputs = [t.float() for t in draw()]
    arguments = (inputs[0], inputs[1], 25, 20, inputs[2])
    checks.check_prune_merge((x, size, slot), *arguments)

    merged = (slot >= 0).long().cumsum(1)  # any permutation of destinations is a wrong match
    other = torch.where(slot >= 1, (slot % 19) + 1, slot)
    for wrong in (
        (x + 1e-4, size, slot),
        (x, size * 1.001, slot),
        (x, size, other),
        (x, size, merged),
        (torch.full_like(x, torch.nan), size, slot),
    ):
        with pytest.raises(checks.WrongResultError):
            checks.check_prune_merge(wrong, *arguments)

    ordered = reference.sort_tokens(inputs[0], inputs[1], inputs[2])
    checks.check_sort_tokens(ordered, *inputs[:3])
    with pytest.raises(checks.WrongResultError):
        checks.check_sort_tokens((ordered[0], ordered[1], ordered[2].flip(1)), *inputs[:3])


def test_contenders_take_turns() -> None:
    turns: list[str] = []

    def contender(name: str) -> Callable[[int], None]:
        def call(_: int) -> None:
            turns.append(name)
            time.sleep(0.01)

        return call

    names = ["a", "b", "c"]
    timings = harness.measure(
        {name: contender(name) for name in names}, [(0,)], device=CPU, rounds=4, min_seconds=0.001
    )
    assert turns[-12:] == names * 4
    assert timings.rounds == 4
    assert timings.ratio("a", "a") == harness.Spread(1, 1, 1)
    with pytest.raises(ValueError, match="at least 3"):
        harness.measure({"a": contender("a")}, [(0,)], device=CPU, rounds=2, min_seconds=0)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    mebi = 2**20

    def one_after_another() -> Tensor:
        torch.ones(32 * mebi // 4)
        return torch.ones(32 * mebi // 4)

    def side_by_side() -> list[Tensor]:
        return [torch.ones(32 * mebi // 4) for _ in range(2)]

    assert harness.peak_memory(one_after_another, CPU) == 32 * mebi
    assert harness.peak_memory(side_by_side, CPU) == 64 * mebi
    assert harness.peak_memory(lambda: None, CPU) == 0


def test_what_cannot_be_compiled_is_reported() -> None:
    def breaks_the_graph(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    fast, reason = harness.compiled(breaks_the_graph, (torch.ones(3),))
    assert fast is None
    assert reason


def test_index_page_says_what_was_not_measured(tmp_path: Path) -> None:
    page = report.index_page(tmp_path)
    assert "Not yet run on a GPU" in page
    assert page.count("\n- `gpu.sh ") == len(report.ON_A_GPU)
    (tmp_path / "cuda_ops.json").write_text(json.dumps({"machine": {**MACHINE, "gpu": "a GPU"}, "records": []}))
    report.rewrite(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not yet run on a GPU" not in page
    assert "a GPU, today" in page
    assert page.count("\n- `gpu.sh ") == len(report.ON_A_GPU) - 1
    for name in report.ON_A_GPU:
        (tmp_path / f"{name}.md").write_text("", encoding="utf-8")
    page = report.index_page(tmp_path)
    assert "Unverified" not in page
    assert "[cuda_test](cuda_test.md)" in page


def test_committed_pages_are_those_of_the_committed_results(tmp_path: Path) -> None:
    results = BENCHMARKS / "results"
    shutil.copytree(results, tmp_path / "results")
    report.rewrite(tmp_path / "results")
    for path in results.glob("*.md"):
        assert (tmp_path / "results" / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def test_searches_of_a_gpu_run() -> None:
    found = search_step.searches(torch.device("cuda"), quick=False)
    assert [(spec.name, spec.batch) for spec in found] == [("DeiT-S", 128), ("embedded ViT", 128)]
    assert not any(spec.bars for spec in found)
    assert all(spec.bars for spec in search_step.searches(CPU, quick=False))


@pytest.mark.slow
def test_quick_benchmarks_run(tmp_path: Path) -> None:
    committed = {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    operators = json.loads((tmp_path / "cpu_ops.json").read_text(encoding="utf-8"))["records"]
    assert len({record["operator"] for record in operators}) == 9
    assert all("diffrate_ext" in record["relative_error"] for record in operators)
    models = json.loads((tmp_path / "cpu_models.json").read_text(encoding="utf-8"))["records"]
    assert {record["batch"] for record in models} == {1, 4, 16}
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")} == committed
