"""What an operator's benchmark consists of, and how one is run."""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from checks import WrongResultError
from harness import COMPILED, GRAPH, Timings, compiled, measure, peak_memory
from machine import cache_bytes, measure_bandwidth, measure_rate
from torch import Tensor

from diffrate_ext.running import captured

OURS, EAGER, FLOOR = "diffrate_ext", "eager", "floor"
PEAK_MEMORY = ": peak memory"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """The tokens of one layer: N = tokens with one class token, C = heads * head_dim channels."""

    model: str
    batch: int
    channels: int
    heads: int
    tokens: int = 197
    head_dim: int = 64

    @property
    def label(self) -> str:
        return f"{self.model} batch {self.batch}"


@dataclass(frozen=True)
class Settings:
    """Where, in which dtype and how thoroughly operators are timed."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def judged_on_gpu(self) -> bool:
        """Whether the project's bars for a GPU are meant for this run."""
        return self.on_gpu and self.dtype != torch.float32 and not self.quick

    @property
    def shapes(self) -> list[Shape]:
        models = [("ViT-S", 384, 6), ("ViT-B", 768, 12), ("ViT-L", 1024, 16)]
        if self.on_gpu and not self.quick:  # nothing smaller fills one
            return [*(Shape(m, 256, c, h) for m, c, h in models), Shape("ViT-H", 256, 1280, 16, 257, 80)]
        return [Shape(m, batch, c, h) for m, c, h in (models[:1] if self.quick else models) for batch in (1, 16)]

    @property
    def search_shapes(self) -> list[Shape]:
        """For the operators of the search step, with gradients."""
        batch = 128 if self.on_gpu and not self.quick else 8
        models = [("ViT-S", 384, 6), ("ViT-B", 768, 12)]
        return [Shape(m, batch, c, h) for m, c, h in (models[:1] if self.quick or self.on_gpu else models)]

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 21 if self.on_gpu else 41

    @property
    def min_seconds(self) -> float:
        return 0.002 if self.quick else 0.01

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def importance(self, shape: Shape) -> Tensor:
        return torch.rand(shape.batch, shape.tokens - 1, device=self.device)

    def sizes(self, shape: Shape) -> Tensor:
        return 1 + 3 * torch.rand(shape.batch, shape.tokens, device=self.device)

    def qkv(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) as timm has them: views of one packed projection."""
        packed = self.randn(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


@dataclass(frozen=True)
class Bar:
    """A ratio to reach: ``rival`` takes at least ``ratio`` times as long, or as much memory, as diffrate_ext.

    ``rival`` is a contender, FLOOR, or a contender and PEAK_MEMORY.
    """

    rival: str
    ratio: float
    kind: str = "bar"  # or "aim"

    def judge(self, ratios: Mapping[str, float]) -> dict[str, Any]:
        """What was not measured, because it could not be run, is not reached either."""
        reached = ratios.get(self.rival, 0.0)
        return {
            "rival": self.rival,
            "kind": self.kind,
            "needed": self.ratio,
            "reached": reached,
            "met": reached >= self.ratio,
        }


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    ``make_inputs`` draws a fresh set of positional arguments; every contender takes them. ``check`` takes a contender's
    result and the arguments and raises when they do not fit. ``moved`` and ``operations`` are the fewest bytes to move
    and the arithmetic operations (a multiply-accumulate is two) of one call. ``yardsticks`` are timed, not checked.
    With ``trains``, contenders run forward and backward and return results and gradients; nothing is compiled then.
    """

    operator: str
    label: str
    shape: Shape
    ours: Callable[..., Any]
    rivals: dict[str, Callable[..., Any]]
    make_inputs: Callable[[], tuple[Any, ...]]
    check: Callable[..., float]
    moved: int
    operations: int
    bars: tuple[Bar, ...] = ()
    yardsticks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    compile_when_quick: bool = False
    trains: bool = False
    own_scratch: int = 0  # bytes that our kernel takes beside torch's allocator, which does not see them


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: bytes per second of a copy, operations per second of a matrix product."""

    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        return cls(measure_bandwidth(device), measure_rate(device, dtype))

    def floor(self, moved: int, operations: int) -> tuple[float, str]:
        """The seconds no implementation can beat by much, and what they are spent on."""
        by_memory, by_arithmetic = moved / self.bandwidth, operations / self.rate
        return (by_memory, "memory") if by_memory >= by_arithmetic else (by_arithmetic, "arithmetic")


def run_case(case: Case, settings: Settings, ceilings: Ceilings) -> dict[str, Any]:
    """Checks all contenders against the reference, then times them; returns the record for the results."""
    device = settings.device
    torch.manual_seed(0)
    with torch.enable_grad() if case.trains else torch.inference_mode():
        # on a GPU twice what its cache holds; but what is small enough to stay in it anyway need not be pushed out
        sets = 4 if device.type == "cpu" else min(32, max(4, 2 * cache_bytes(device) // case.moved + 1))
        inputs = [case.make_inputs() for _ in range(sets)]

        contenders = {OURS: case.ours, **case.rivals}
        unavailable: dict[str, str] = {}
        if not (case.trains or settings.on_gpu) and (not settings.quick or case.compile_when_quick):
            for name, rival in case.rivals.items():
                fast, reason = compiled(rival, inputs[0])
                if fast is None:
                    unavailable[f"{name}, {COMPILED}"] = reason or ""
                else:
                    contenders[f"{name}, {COMPILED}"] = fast

        fresh = case.make_inputs()
        errors = {name: checked(case, name, call, fresh) for name, call in contenders.items()}

        contenders.update(case.yardsticks)
        timings = measure(contenders, inputs, device=device, rounds=settings.rounds, min_seconds=settings.min_seconds)
        peaks = {
            name: peak_memory(functools.partial(call, *inputs[0]), device)
            for name, call in contenders.items()
            if name not in case.yardsticks
        }
        peaks[OURS] += case.own_scratch
        results = {name: result_bytes(contenders[name](*inputs[0])) for name in peaks}
        # last, for what a failed capture leaves behind
        graphs, not_captured = timed_graphs(case, contenders, inputs, settings)
        unavailable.update(not_captured)

    seconds = {name: vars(timings.time(name)) for name in contenders}
    ratio = {name: vars(timings.ratio(name, OURS)) for name in contenders if name != OURS}
    fastest = seconds[OURS]["median"]
    if graphs is not None:
        ours = f"{OURS}, {GRAPH}"
        seconds.update({name: vars(graphs.time(name)) for name in graphs.seconds})
        ratio.update({name: vars(graphs.ratio(name, ours)) for name in graphs.seconds if name != ours})
        fastest = seconds[ours]["median"]
    floor, limited_by = ceilings.floor(case.moved, case.operations)
    reached = {name: spread["median"] for name, spread in ratio.items()}
    reached[FLOOR] = floor / fastest
    for name in peaks:
        reached[f"{name}{PEAK_MEMORY}"] = peaks[name] / max(1, peaks[OURS])
        beyond = (peaks[name] - results[name]) / max(1, peaks[OURS] - results[OURS])
        reached[f"{name}, beyond results{PEAK_MEMORY}"] = beyond
    return {
        "operator": case.operator,
        "case": case.label,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "shape": vars(case.shape),
        "rounds": timings.rounds,
        "seconds": seconds,
        "ratio": ratio,
        "relative_error": errors,
        "unavailable": unavailable,
        "peak_bytes": peaks,
        "result_bytes": results,
        "floor": {
            "seconds": floor,
            "limited_by": limited_by,
            "bytes": case.moved,
            "operations": case.operations,
            **vars(ceilings),
        },
        "bars": [bar.judge(reached) for bar in case.bars],
    }


def timed_graphs(
    case: Case,
    contenders: Mapping[str, Callable[..., Any]],
    inputs: Sequence[tuple[Any, ...]],
    settings: Settings,
) -> tuple[Timings | None, dict[str, str]]:
    """Seconds per call in a CUDA graph of one call on each set of inputs: the time without launch gaps.

    Of what trains only our own step: eager search steps look at kept numbers on the host, which cannot be captured.
    """
    if not settings.on_gpu:
        return None, {}
    graphs: dict[str, Callable[..., Any]] = {}
    unavailable = {}
    # what bars speak of first: after a failure nothing more can be captured
    others = [] if case.trains else [*case.yardsticks, *case.rivals]
    for name in (OURS, *others):
        replay, reason = captured(functools.partial(on_each, contenders[name], inputs))
        if replay is None:
            unavailable[f"{name}, {GRAPH}"] = reason or ""
            break
        graphs[f"{name}, {GRAPH}"] = replay
    if not graphs:
        return None, unavailable
    passes = measure(
        graphs, [()], device=settings.device, rounds=settings.rounds, min_seconds=settings.min_seconds
    ).seconds
    return Timings({name: [each / len(inputs) for each in passes[name]] for name in graphs}), unavailable


def on_each(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> None:
    for arguments in inputs:
        call(*arguments)


def with_gradient(operator: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward: results and the gradient of the first argument, given that of the first result."""

    def step(gradient: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        results = operator(x, *rest)
        results = results if isinstance(results, tuple) else (results,)
        return *(result.detach() for result in results), *torch.autograd.grad(results[0], x, gradient)

    return step


def result_bytes(result: Any) -> int:
    """Of the tensors that a call returns."""
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors if isinstance(tensor, Tensor))


def checked(case: Case, name: str, call: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    try:
        with poisoned_memory() if name == OURS else nullcontext():
            result = call(*inputs)
        return case.check(result, *inputs)
    except WrongResultError as error:
        raise WrongResultError(f"{case.operator}, {case.label}, {name}: {error}") from None


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors start out as NaN or the largest integer while it lasts, so that what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def main(cases: Callable[[Settings], Iterable[Case]]) -> None:
    """Command line of one operator's benchmark: prints its table and writes nothing."""
    from report import operators_table

    parser = argparse.ArgumentParser(description="Times one operator against its rivals and prints a table.")
    parser.add_argument("--quick", action="store_true", help="few rounds, ViT-S only")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    arguments = parser.parse_args()
    settings = Settings(torch.device(arguments.device), DTYPES[arguments.dtype], arguments.quick)
    ceilings = Ceilings.measured(settings.device, settings.dtype)
    print(operators_table(list(records(cases, settings, ceilings))))


def records(
    cases: Callable[[Settings], Iterable[Case]], settings: Settings, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    for case in cases(settings):
        yield run_case(case, settings, ceilings)


def is_reference_run(settings: Settings, shape: Shape) -> bool:
    """Whether the project's bars are meant for this run: two-core CPU, float32, ViT-S, batch 16."""
    return settings.device.type == "cpu" and settings.dtype == torch.float32 and shape.label == "ViT-S batch 16"
