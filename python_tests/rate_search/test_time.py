"""Searches for time by a cost table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_costs import table_of
from tiny_models import tiny_caformer, tiny_images, tiny_vit

from diffrate_ext import (
    CostTable,
    InputTypeError,
    InputValueError,
    RateSearch,
    SearchSettings,
    flops,
    search,
    uniform_schedule,
)
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.models import adapter_for
from diffrate_ext.schedule import Schedule

# attention is cheap and MLPs are dear, but for a step in the middle
UNEVEN: dict[str, Any] = {"attention": lambda n: 0.01 * n, "mlp": lambda n: 0.1 * n + 2.0 * (n > 9), "fixed": 0.5}


def batches() -> list[Any]:
    model = tiny_vit()
    generator = torch.Generator().manual_seed(0)
    return [(tiny_images(model, 4), torch.randint(5, (4,), generator=generator)) for _ in range(4)]


def time_of(model: Any, schedule: Schedule, costs: CostTable) -> float:
    kept = adapter_for(model).kept_numbers(schedule)
    return float(costing_of(model, costs).of([[left for _, left in numbers] for numbers in kept]))


@pytest.mark.parametrize("method", ["diffrate", "tome"])
@pytest.mark.parametrize("kind", ["relative", "none"])
def test_a_search_ends_at_its_time(method: str, kind: Any, tmp_path: Path) -> None:
    model = tiny_vit(depth=8)
    costs = table_of(model, method=method, **UNEVEN)
    settings = SearchSettings(steps=6, method=method, flops_loss=kind)
    result = search(model, batches(), settings=settings, speedup=1.3, costs=costs, output=tmp_path / "found")
    assert result.unit == "ms"
    assert result.target == pytest.approx(costing_of(model, costs).uncompressed / 1.3)
    assert result.cost == time_of(model, result.schedule, costs)
    assert result.cost == pytest.approx(result.target, rel=0.06)  # one token of 17 is a good deal
    assert result.gflops == flops(model, result.schedule) / 1e9
    history = json.loads((tmp_path / "found/history.json").read_text())
    assert history["target_milliseconds"] == result.target
    if kind == "none":  # held there in every step
        assert [record.cost for record in result.history.records] == pytest.approx([result.target] * 6, rel=0.1)
    assert history["records"][-1]["milliseconds"] == pytest.approx(result.history.records[-1].cost)
    again = search(
        model, batches(), settings=settings, speedup=1.3, costs=costs, output=tmp_path / "found", resume=True
    )
    assert again.schedule == result.schedule
    with pytest.raises(InputValueError, match="target in ms: "):
        search(model, batches(), settings=settings, speedup=1.2, costs=costs, output=tmp_path / "found", resume=True)


def test_the_cost_of_rates_and_its_gradient() -> None:
    model = tiny_vit()
    costs = table_of(model, reduction=lambda tokens: 0.0)
    rates = RateSearch(model, costs=costs)
    rates.set_schedule(uniform_schedule(model, "70%"))
    assert rates.cost().item() == pytest.approx(time_of(model, rates.schedule(), costs), rel=1e-5)
    assert rates.gflops().item() == pytest.approx(flops(model, rates.schedule()) / 1e9, rel=1e-5)
    rates.cost().backward()
    assert rates.merge_logits is not None
    assert rates.merge_logits.grad is not None
    assert float(rates.merge_logits.grad.abs().sum()) > 0


def test_rates_shifted_to_a_time() -> None:
    model = tiny_vit(depth=8)
    costs = table_of(model, **UNEVEN)
    rates, uncompressed = RateSearch(model, costs=costs), costing_of(model, costs).uncompressed
    rates.project("80%")
    assert time_of(model, rates.schedule(), costs) == pytest.approx(0.8 * uncompressed, rel=0.06)
    assert rates.reachable()[1] == pytest.approx(uncompressed)
    with pytest.raises(InputValueError, match=r"1 ms cannot be reached: .* with all the tokens removed that may be"):
        rates.project(1.0)


def test_a_model_with_several_stages() -> None:
    model = tiny_caformer()
    costs = table_of(model)
    result = search(model, [tiny_images(model, 2)], settings=SearchSettings(steps=2, soft_targets=True), speedup=1.05,
                    costs=costs)  # fmt: skip
    assert result.cost == pytest.approx(result.target, rel=0.02)


def test_refused() -> None:
    model = tiny_vit()
    with pytest.raises(InputTypeError, match="speedup needs costs"):
        search(model, batches(), speedup=1.5)
    with pytest.raises(InputTypeError, match="name one target"):
        search(model, batches())
    for refused in (lambda: RateSearch(model, method="tome", costs=table_of(model)),
                    lambda: uniform_schedule(model, method="tome", speedup=1.1, costs=table_of(model))):  # fmt: skip
        with pytest.raises(InputValueError, match="the costs are of the method diffrate, and this is for tome"):
            refused()
    merging = "diffrate:operations=merge"  # one method, with another option
    assert uniform_schedule(model, method=merging, speedup=1.1, costs=table_of(model)).method == merging
    with pytest.raises(InputValueError, match="the costs are of another model"):
        RateSearch(model, costs=table_of(tiny_caformer()))
