"""Timing side by side: every contender once per round, in the same process, until there are rounds enough."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from machine import synchronize

from diffrate_ext import running
from diffrate_ext.machine import settle_memory
from diffrate_ext.running import captured

Call = Callable[..., object]
PLAIN, GRAPH, COMPILED = "plain", "CUDA graph", "compiled"
"""How a contender is run: as it is, replayed from a CUDA graph, or by torch.compile."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each contender, one entry per round; entry i of all contenders belongs to the same round."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> Spread:
        """How often ``faster`` runs while ``slower`` runs once: per round, so that drift of the machine cancels."""
        return Spread.of([s / f for s, f in zip(self.seconds[slower], self.seconds[faster], strict=True)])


def _seconds(call: Call, inputs: Sequence[tuple[Any, ...]], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(calls):
            call(*inputs[i % len(inputs)])
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for i in range(calls):
        call(*inputs[i % len(inputs)])
    return (time.perf_counter() - begin) / calls


def measure(
    contenders: Mapping[str, Call],
    inputs: Sequence[tuple[Any, ...]],
    *,
    device: torch.device,
    rounds: int,
    min_seconds: float,
    max_seconds: float = math.inf,
) -> Timings:
    """Times ``call(*inputs[i])`` for all contenders, A B C A B C ...

    Args:
        contenders: callables by name.
        inputs: sets of arguments to rotate through.
        rounds: measurements per contender, at least 3.
        min_seconds: a measurement repeats its call until it takes about this long.
        max_seconds: no new round is begun after this long, except to have 5 (or ``rounds``, if those are fewer).
    """
    if rounds < 3:
        raise ValueError(f"rounds must be at least 3 to have quartiles, got {rounds}")
    if device.type == "cpu":
        settle_memory()
    calls = {}
    for name, call in contenders.items():
        _seconds(call, inputs, len(inputs), device)
        synchronize(device)
        once = _seconds(call, inputs, len(inputs), device)
        calls[name] = max(1, math.ceil(min_seconds / once))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.monotonic()
    for done in range(rounds):
        if done >= 5 and time.monotonic() - begin > max_seconds:
            break
        for name, call in contenders.items():
            seconds[name].append(_seconds(call, inputs, calls[name], device))
    return Timings(seconds)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that one call adds at its peak, its result included, by torch's allocator on either device.

    Call it once beforehand, so that one-time set-up does not count. (The resident pages of the process would also count
    scratch memory that a kernel takes elsewhere, but on a CPU they measure malloc's fragmentation more than the call.)
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    assert profile.profiler is not None
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(0, *itertools.accumulate(changes), 0)


def compiled(call: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Callable[..., Any] | None, str | None]:
    """As ``running.compiled``. Whatever was compiled before does not count towards the limit of recompilations."""
    torch._dynamo.reset()
    return running.compiled(call, inputs)


def graph_seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median time of a call as a CUDA graph; of the call itself where there is no GPU, to try a script out.

    Raises:
        RuntimeError: it cannot be captured.
    """
    replay, reason = captured(call) if device.type == "cuda" else (call, None)
    if replay is None:
        raise RuntimeError(reason)
    return measure({GRAPH: replay}, [()], device=device, rounds=rounds, min_seconds=0).time(GRAPH).median
