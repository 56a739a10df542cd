"""Times and memory are measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable

import harness
import pytest
import torch
from torch import Tensor

CPU = torch.device("cpu")


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


def test_a_graph_is_timed_or_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert 0.01 <= harness.graph_seconds(lambda: time.sleep(0.01), CPU, 3) < 1
    monkeypatch.setattr(harness, "captured", lambda call: (None, "it waits"))
    with pytest.raises(RuntimeError, match="it waits"):
        harness.graph_seconds(lambda: None, gpu, 3)
    replays: list[None] = []
    monkeypatch.setattr(harness, "captured", lambda call: (lambda: replays.append(None), None))
    monkeypatch.setattr(harness, "_seconds", lambda call, inputs, calls, device: call() or 1e-3)
    monkeypatch.setattr(harness, "synchronize", lambda device: None)
    assert harness.graph_seconds(lambda: pytest.fail("the call itself is timed"), gpu, 3) == 1e-3
    assert len(replays) >= 3


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
