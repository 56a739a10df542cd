"""What a schedule costs by a table, in numbers and with a gradient; saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_costs import table_of
from tiny_models import tiny_caformer, tiny_vit

from diffrate_ext import CostTable, InputValueError

TOKENS = 17


def test_what_a_schedule_costs() -> None:
    table = table_of(tiny_vit(), reduction=lambda tokens: 0.01 * tokens)
    # attention and what it takes to remove some at the tokens that come, MLP at those that are left
    expected = 1.0 + 0.1 * (17 + 17 + 12 + 12) + 0.2 * (17 + 12 + 12 + 5) + 0.01 * (17 + 12)
    assert table.total([[17, 12, 12, 5]]) == pytest.approx(expected)
    assert table.total([[17] * 4]) == pytest.approx(1.0 + 0.3 * 17 * 4)


def test_every_stage_counts() -> None:
    table = table_of(tiny_caformer())
    assert table.total([[16] * 4, [4] * 2]) == pytest.approx(1.0 + 0.3 * 16 * 4 + 0.3 * 4 * 2)


def test_between_what_was_measured_on_a_straight_line() -> None:
    table = table_of(tiny_vit(), attention=lambda tokens: 0.0, reduction=lambda tokens: 0.0, every=5)
    (stage,) = table.stages
    assert stage.tokens == (2, 7, 12, 17)
    assert table.total([[9, 9, 9, 9]]) == pytest.approx(1.0 + 4 * 0.2 * 9)
    assert table.total([[1, 1, 1, 1]]) == pytest.approx(1.0 + 4 * 0.2 * 2)  # as at the fewest


@given(kept=st.lists(st.floats(1, TOKENS), min_size=4, max_size=4))
def test_a_tensor_costs_what_its_number_costs(kept: list[float]) -> None:
    table = table_of(tiny_vit(), attention=lambda tokens: 0.01 * tokens**2, mlp=lambda tokens: tokens // 4, every=3)
    falling = sorted(kept, reverse=True)
    tensors = [torch.tensor(number, dtype=torch.float64) for number in falling]
    assert float(table.total([tensors])) == pytest.approx(table.total([falling]), rel=1e-9)


def test_the_gradient_sees_over_a_step() -> None:
    """Time that stands still between two steps would tell a search nothing."""
    table = table_of(tiny_vit(), attention=lambda tokens: 0.0, reduction=lambda tokens: 0.0, mlp=lambda n: n // 4 * 4.0)
    kept = [torch.tensor(float(n), dtype=torch.float64, requires_grad=True) for n in (17, 13, 10, 9)]
    table.total([kept]).backward()
    for one in kept:
        assert one.grad is not None
        assert 0.3 < float(one.grad) < 3
    falling = table_of(tiny_vit(), mlp=lambda tokens: -tokens)
    (one,) = kept[1:2]
    one.grad = None
    falling.total([[17, one, 9, 9]]).backward()
    assert one.grad is not None
    assert float(one.grad) >= 0  # noise is not to make more tokens look cheaper


def test_saved_and_loaded(tmp_path: Path) -> None:
    table = table_of(tiny_caformer())
    table.save(tmp_path / "table.json")
    assert CostTable.load(tmp_path / "table.json") == table


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CostTable.load(tmp_path / "nowhere.json")
    path = tmp_path / "table.json"
    table_of(tiny_vit()).save(path)
    content = json.loads(path.read_text())
    (stage,) = content["stages"]
    damaged: list[dict[str, Any]] = [
        {"tokens": stage["tokens"][1:]},
        {"tokens": stage["tokens"][::-1]},
        {"attention": [None, *stage["attention"][1:]]},
        {"mlp": [-5.0, *stage["mlp"][1:]]},
        {"entering": 99},
        {"blocks": "four"},
    ]
    wrong = [
        "no JSON",
        "[]",
        json.dumps({**content, "format": "another"}),
        json.dumps({name: value for name, value in content.items() if name != "fixed"}),
        json.dumps({**content, "more": 1}),
        json.dumps({**content, "fixed": float("nan")}),
        json.dumps({**content, "batch_size": "x"}),
        *(json.dumps({**content, "stages": [{**content["stages"][0], **change}]}) for change in damaged),
    ]
    for text in wrong:
        path.write_text(text)
        with pytest.raises(InputValueError, match=r"table\.json is not a cost table as diffrate profile writes it"):
            CostTable.load(path)
