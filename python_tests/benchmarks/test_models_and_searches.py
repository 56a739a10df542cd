"""Benchmarks of whole models and of the search step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import cases
import harness
import models
import pytest
import report
import search_step
import torch
from torch import Tensor

from diffrate_ext import InputValueError, RateSearch, ops
from diffrate_ext.embedded import build_model

CPU = torch.device("cpu")


def test_plan_of_a_gpu_run() -> None:
    gpu = torch.device("cuda")
    half = models.plan(gpu, torch.bfloat16, quick=False, compile_models=False)
    assert len({tuple(item.key.values()) for item in half}) == len(half) == 4 * 4 + 2
    sized = (models.DEIT_S, models.DEIT_B, models.VIT_L, models.VIT_H)
    gains = {(item.model, item.way): item.gains for item in half if item.gains}
    assert gains == {
        **{(model, harness.PLAIN): ((1.05, "bar"), (1.15, "aim")) for model in sized},
        **{(model, harness.COMPILED): ((1.0, "bar"),) for model in (models.DEIT_B, models.VIT_L)},
    }
    assert all(item.batch == 256 for item in half if item.gains)
    small = {(item.batch, item.way, bar.ratio) for item in half for bar in item.bars}
    assert small == {(1, harness.PLAIN, 1 / 1.15), (1, harness.GRAPH, 1.0), (32, harness.GRAPH, 1.0)}
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

    monkeypatch.setattr(models.running, "captured", captured)
    graph = models.run_model(models.Run(models.EMBEDDED, 1, harness.GRAPH), CPU, torch.float32, quick=True)
    assert graph["relative_error"].keys() == {cases.OURS, cases.EAGER}
    assert set(graph["seconds"]) == {models.UNCOMPRESSED, cases.OURS, cases.EAGER}
    assert graph["peak_bytes"] == {}
    assert "| CUDA graph | diffrate_ext |" in report.models_table([graph])


def test_a_full_run_tells_compression_from_the_patch_embedding() -> None:
    item = models.Run(models.EMBEDDED, 2, contenders=models.IN_FULL_RUNS)
    record = models.run_model(item, CPU, torch.float32, quick=True)
    assert set(record["seconds"]) == set(models.IN_FULL_RUNS)
    contenders = models.prepared(models.EMBEDDED, CPU, torch.float32).contenders
    kinds = {
        name: type(contender.patch_embed.proj).__name__  # type: ignore[union-attr]
        for name, contender in contenders.items()
        if name in (models.UNCOMPRESSED, cases.OURS, models.ALONE)
    }
    assert kinds == {models.UNCOMPRESSED: "Conv2d", cases.OURS: "CompressedConv2d", models.ALONE: "Conv2d"}


def test_there_are_no_graphs_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    assert harness.captured(lambda: None) == (None, "no GPU")
    bars = (cases.Bar(models.UNCOMPRESSED, 1.0),)
    record = models.run_model(models.Run(models.EMBEDDED, 1, harness.GRAPH, bars=bars), CPU, torch.float32, quick=True)
    assert record["unavailable"] == {"uncompressed, CUDA graph": "no GPU"}
    assert record["bars"][0]["met"] is False
    assert "no GPU" in report.models_table([record])


def test_searches_of_a_gpu_run() -> None:
    found = search_step.searches(torch.device("cuda"), quick=False)
    assert [(spec.name, spec.batch) for spec in found] == [("DeiT-S", 128), ("embedded ViT", 128)]
    assert not any(spec.bars for spec in found)
    assert all(spec.bars for spec in search_step.searches(CPU, quick=False))


def test_steps_of_a_whole_search_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_step, "LOOP_STEPS", 8)
    times = search_step.loop_seconds(search_step.QUICK_SEARCHES[0], CPU, cuda_graph=False)
    assert len(times) == 8 - 1 - search_step.FIRST_STEPS
    assert min(times) > 0
    with pytest.raises(InputValueError, match="cuda_graph needs a model on a CUDA device"):
        search_step.loop_seconds(search_step.QUICK_SEARCHES[0], CPU, cuda_graph=True)


def test_the_rival_of_a_search_step_uses_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("an operator was called")

    for name in ops.__all__:
        if name.islower():
            monkeypatch.setattr(ops, name, refuse)
    torch.manual_seed(0)
    rates = RateSearch(build_model()).train()
    arguments = (rates, torch.randn(2, 1, 28, 28), torch.arange(2), 0.2)
    with search_step.reference_operators():
        loss, *gradients = search_step.search_step(*arguments)
    assert all(tensor.isfinite().all() for tensor in (loss, *gradients))
    with pytest.raises(AssertionError, match="an operator was called"):
        search_step.search_step(*arguments)
