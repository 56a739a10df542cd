"""What tokens cost: FLOPs, or time on a machine where that was measured; and targets of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from torch import nn

from ..cost_table import CostTable
from ..errors import InputTypeError, InputValueError
from ..methods import Method
from ..models import Adapter, adapter_for
from ..schedule import Schedule
from .targets import gflops_of, share_in, share_meant

Unit = Literal["GFLOPs", "ms"]


@dataclass(frozen=True)
class Costing:
    """How a model's cost is counted: GFLOPs of one image, or milliseconds of a batch."""

    adapter: Adapter
    costs: CostTable | None

    @property
    def unit(self) -> Unit:
        return "GFLOPs" if self.costs is None else "ms"

    @property
    def uncompressed(self) -> float:
        """What the model costs as it is now, without compression."""
        return float(self.of([[stage.tokens] * len(stage.blocks) for stage in self.adapter.stages]))

    def of(self, kept: Sequence[Sequence[Any]]) -> Any:
        """The cost, given the tokens left after each block of each stage.

        Tokens are whole numbers or, in the rate search, 0-d tensors with a gradient; so is the result.
        """
        return self.adapter.cost.total(kept) / 1e9 if self.costs is None else self.costs.total(kept)

    def of_schedule(self, schedule: Schedule) -> float:
        """The model's cost under a schedule that fits it."""
        kept = self.adapter.kept_numbers(schedule)
        return float(self.of([[left for _, left in numbers] for numbers in kept]))

    def target(
        self, gflops: float | str | None = None, *, speedup: float | None = None, latency: float | None = None
    ) -> float:
        """A target in this unit, named in one of three ways.

        Raises:
            InputTypeError: none or several were named, or one that is counted in another unit.
            InputValueError: a number that is not positive and finite.
        """
        named = {"gflops": gflops, "speedup": speedup, "latency": latency}
        given = [name for name, value in named.items() if value is not None]
        if len(given) != 1:
            raise InputTypeError(f"name one target: gflops, speedup or latency; got {' and '.join(given) or 'none'}")
        if gflops is not None:
            if self.unit != "GFLOPs":
                raise InputTypeError("with costs name a target of time: speedup or latency")
            return gflops_of(self.adapter.model, gflops)
        if self.unit != "ms":
            raise InputTypeError(f"{given[0]} needs costs: what diffrate_ext.profile_model(model) returns")
        if speedup is not None:
            return self.uncompressed / _positive("speedup", speedup)
        return _positive("latency", latency)

    def number(self, target: float | str) -> float:
        """A target as a number in this unit, or as a share of the uncompressed model's cost (``"60%"``)."""
        if self.unit == "GFLOPs":
            return gflops_of(self.adapter.model, target)
        return share_in(target) * self.uncompressed if isinstance(target, str) else _positive("target", target)

    def options(self, target: float) -> dict[str, Any]:
        """What to call :func:`uniform_schedule` with for a target in this unit."""
        return {"gflops": target} if self.unit == "GFLOPs" else {"latency": target, "costs": self.costs}

    def unreachable(self, target: float, least: float, how: str) -> InputValueError:
        """What to raise where a target is out of reach; ``how`` the least was reached."""
        hint = share_meant(target, self.uncompressed) if self.unit == "GFLOPs" else ""
        return InputValueError(
            f"{target:g} {self.unit} cannot be reached: the model takes {self.uncompressed:.4g} uncompressed, and "
            f"{least:.4g} {how}{hint}"
        )


def costing_of(model: nn.Module, costs: CostTable | None = None) -> Costing:
    """By FLOPs, or by a cost table.

    Raises:
        InputTypeError: the model's family is not supported, or ``costs`` is no table.
        InputValueError: the costs are of another model.
    """
    adapter = adapter_for(model)
    if costs is not None and not isinstance(costs, CostTable):
        raise InputTypeError(
            f"costs must be a CostTable, as profile_model returns it and CostTable.load reads it, got "
            f"{type(costs).__name__}"
        )
    if costs is not None:
        _check_fits(adapter, costs)
    return Costing(adapter, costs)


def check_method(costs: CostTable | None, method: Method) -> None:
    """Raise InputValueError where costs were measured with another method, whose removing takes another time."""
    if costs is not None and costs.method.partition(":")[0] != method.name:
        raise InputValueError(
            f"the costs are of the method {costs.method}, and this is for {method}: profile the model with it"
        )


def _check_fits(adapter: Adapter, costs: CostTable) -> None:
    gflops = Costing(adapter, None).uncompressed
    found = [(stage.blocks, stage.entering) for stage in costs.stages], costs.prefix, round(costs.gflops, 6)
    blocks = [(len(stage.blocks), stage.tokens) for stage in adapter.stages]
    wanted = blocks, adapter.rules.prefix, round(gflops, 6)
    if found != wanted:
        raise InputValueError(
            f"the costs are of another model, {costs.model or 'without a name'}, of {_form(*found)}; this one has "
            f"{_form(*wanted)}: profile it"
        )


def _form(stages: Sequence[tuple[int, int]], prefix: int, gflops: float) -> str:
    words = " and ".join(f"{blocks} blocks on {tokens} tokens" for blocks, tokens in stages)
    return f"{words} ({prefix} of them prefix) and {gflops:.4g} GFLOPs"


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not 0 < number < float("inf"):
        raise InputValueError(f"{name} must be positive and finite, got {value}")
    return number
