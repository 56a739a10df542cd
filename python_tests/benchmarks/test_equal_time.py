"""The benchmark of searches for time: equal times are found, and what is compared is what was found."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equal_time
import numpy as np
import pytest
from evidence.subjects import Subject, fashion_mnist
from tiny_costs import table_of

from diffrate_ext import CostTable, InputValueError, Schedule, embedded, flops, uniform_schedule
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.judging import Judgement

EFFORT = equal_time.Effort(shares=("60%",), seeds=2, search_steps=2, search_images=8, rounds=3, batch_size=2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return replace(fashion_mnist(tmp_path_factory.mktemp("data") / "missing", 6), batch_size=2)


@pytest.fixture(scope="module")
def costs() -> CostTable:
    return table_of(embedded.build_model(), every=8)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of searches, which return uniform schedules, what they are to look for."""
    targets: list[dict[str, Any]] = []

    def search(model: Any, loader: Any, share: Any = None, settings: Any = None, **target: Any) -> Any:
        targets.append({"share": share, "seed": settings.seed, "latency": target.get("latency")})
        return SimpleNamespace(schedule=uniform_schedule(model, share, **target))

    monkeypatch.setattr(equal_time, "search", search)
    return targets


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [([1.005], 0), ([1.2, 0.995], 1), ([1.1, 0.95, 1.06], 1), ([0.98, 1.03, 1.04], 0)],
)
def test_the_target_moves_until_both_are_as_fast(
    ratios: list[float],
    kept: int,
    subject: Subject,
    costs: CostTable,
    searched: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter(ratios)
    seen: list[Schedule] = []

    def time_ratios(subject: Subject, first: Schedule, second: Schedule, effort: Any) -> list[float]:
        seen.append(second)
        ratio = next(left)
        return [ratio - 0.001, ratio, ratio + 0.001]

    monkeypatch.setattr(equal_time, "time_ratios", time_ratios)
    found = equal_time.find(subject, costs, "60%", 7, EFFORT)
    assert found.ratio == pytest.approx(ratios[kept])
    assert found.for_time == seen[kept]
    assert next(left, None) is None
    first = costing_of(subject.model, costs).of_schedule(found.by_flops)
    latencies = [first / float(np.prod(ratios[:n])) for n in range(len(ratios))]
    assert [one["latency"] for one in searched] == [None, *(pytest.approx(latency) for latency in latencies)]
    assert {one["seed"] for one in searched} == {7}
    assert flops(subject.model, found.by_flops) == pytest.approx(0.6 * flops(subject.model), rel=0.01)


def test_ratios_are_of_the_second_schedule_to_the_first(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed:
        def __init__(self, model: Any, schedules: list[Schedule], images: Any) -> None:
            assert len(images) == 2
            self.seconds = [[9.0, 2.0, 3.0], [9.0, 4.0, 4.0]]

        def run(self, rounds: int) -> Any:
            return iter(range(rounds))

    monkeypatch.setattr(equal_time, "Comparison", Timed)
    schedule = uniform_schedule(subject.model, "60%")
    assert equal_time.time_ratios(subject, schedule, schedule, EFFORT) == [1.5, 1.0]


def test_less_error_for_time_is_a_negative_difference() -> None:
    def judged(errors: list[float]) -> Judgement:
        return Judgement(np.array(errors), None, None)

    better = {"for FLOPs": [judged([1.0, 2.0, 3.0, 4.0])], "for time": [judged([0.5, 1.5, 2.5, 3.4])]}
    found = equal_time.difference(better)
    assert found.mean == pytest.approx(-0.525)
    assert found.verdict == "lower"


def test_a_record_and_its_page(
    subject: Subject, costs: CostTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    profiled: list[int] = []

    def profile_model(model: Any, batch_size: int) -> CostTable:
        profiled.append(batch_size)
        return costs

    monkeypatch.setattr(equal_time, "profile_model", profile_model)
    subjects: Callable[..., Any] = lambda cache, quick: [(subject, replace(EFFORT, shares=("80%", "60%")))]  # noqa: E731
    monkeypatch.setattr(equal_time, "subjects", subjects)
    equal_time.main(["--quick", "--output", str(tmp_path)])
    records = json.loads((tmp_path / "cpu_equal_time.json").read_text(encoding="utf-8"))["records"]
    assert profiled == [2]
    for record, share in itertools.zip_longest(records, (0.8, 0.6)):
        rows = record["rows"]
        assert [(row["searched"], row["seed"]) for row in rows] == list(
            itertools.product(("for FLOPs", "for time"), (0, 1))
        )
        assert rows[0]["gflops_share"] == pytest.approx(share, rel=0.01)
        assert rows[0]["predicted_speed_up"] == pytest.approx(rows[2]["predicted_speed_up"], rel=0.2)
        errors = {
            kind: np.mean([row["error"] for row in rows if row["searched"] == kind])
            for kind in ("for FLOPs", "for time")
        }
        assert record["difference"]["mean"] == pytest.approx(errors["for time"] - errors["for FLOPs"])
        assert len(record["time_ratio_by_seed"]) == 2
    page = (tmp_path / "cpu_equal_time.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert re.search(r"Fashion-MNIST \| 60% \| \d\.\d\dx \(.*\) \| 6 \| cross-entropy \| ", page)
    assert page.count("| fashion_mnist | 80% | for time | ") == 2
    equal_time.main(["--quick", "--resume", "--output", str(tmp_path)])
    assert profiled == [2]


def test_a_share_that_cannot_be_reached_is_an_error(subject: Subject, costs: CostTable) -> None:
    with pytest.raises(InputValueError, match="cannot be reached"):
        equal_time.find(subject, costs, "1%", 0, EFFORT)
