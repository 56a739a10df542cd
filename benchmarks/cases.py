"""What an operator's benchmark consists of, and how one is run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from checks import WrongResultError
from harness import Spread, compiled, measure, peak_memory
from machine import cache_bytes, measure_bandwidth, measure_rate
from torch import Tensor

OURS = "diffrate_ext"
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
    def shapes(self) -> list[Shape]:
        models = [("ViT-S", 384, 6), ("ViT-B", 768, 12), ("ViT-L", 1024, 16)]
        return [Shape(m, batch, c, h) for m, c, h in (models[:1] if self.quick else models) for batch in (1, 16)]

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 41

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
    """A ratio to reach: ``rival`` takes at least ``ratio`` times as long as diffrate_ext."""

    rival: str
    ratio: float
    kind: str = "bar"  # or "aim"

    def judge(self, reached: Spread) -> dict[str, Any]:
        return {
            "rival": self.rival,
            "kind": self.kind,
            "needed": self.ratio,
            "reached": reached.median,
            "met": reached.median >= self.ratio,
        }


@dataclass(frozen=True)
class MemoryBar:
    """A ratio to reach: beyond its results, ``rival`` takes at least ``ratio`` times the memory of diffrate_ext."""

    rival: str
    ratio: float

    def judge(self, scratch: dict[str, int]) -> dict[str, Any]:
        reached = scratch[self.rival] / max(1, scratch[OURS])
        return {
            "rival": f"{self.rival}, beyond results: peak memory",
            "kind": "bar",
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
    memory_bar: MemoryBar | None = None
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
        sets = 4 if device.type == "cpu" else max(4, 2 * cache_bytes(device) // case.moved + 1)
        inputs = [case.make_inputs() for _ in range(sets)]

        contenders = {OURS: case.ours, **case.rivals}
        unavailable: dict[str, str] = {}
        if not case.trains and (not settings.quick or case.compile_when_quick):
            for name, rival in case.rivals.items():
                fast, reason = compiled(rival, inputs[0])
                if fast is None:
                    unavailable[f"{name}, compiled"] = reason or ""
                else:
                    contenders[f"{name}, compiled"] = fast

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

    bars = [bar.judge(timings.ratio(bar.rival, OURS)) for bar in case.bars]
    if case.memory_bar is not None:
        bars.append(case.memory_bar.judge({name: peaks[name] - results[name] for name in peaks}))
    floor, limited_by = ceilings.floor(case.moved, case.operations)
    return {
        "operator": case.operator,
        "case": case.label,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "shape": vars(case.shape),
        "rounds": timings.rounds,
        "seconds": {name: vars(timings.time(name)) for name in contenders},
        "ratio": {name: vars(timings.ratio(name, OURS)) for name in contenders if name != OURS},
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
        "bars": bars,
    }


def result_bytes(result: Any) -> int:
    """Of the tensors that a call returns."""
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors if isinstance(tensor, Tensor))


def checked(case: Case, name: str, call: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    try:
        return case.check(call(*inputs), *inputs)
    except WrongResultError as error:
        raise WrongResultError(f"{case.operator}, {case.label}, {name}: {error}") from None


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
