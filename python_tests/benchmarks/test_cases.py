"""What an operator's benchmark checks, times and judges."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import cases
import checks
import harness
import pytest
import report
import run
import torch
from torch import Tensor

CPU = torch.device("cpu")


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
    for size in "SBLH":
        assert merging.pop(f"ViT-{size} batch 256 + residual + norm") == []
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
