"""What a block that drops tokens asks of attention: class rows only where that spares a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_caformer, tiny_images, tiny_schedule, tiny_vit
from torch import Tensor, nn

from diffrate_ext import compress, ops
from diffrate_ext.methods import dropping
from diffrate_ext.models.adapter import TokenRules
from diffrate_ext.models.compressed import TokenState

ASKS_FOR_ROWS: dict[str, Callable[[], nn.Module]] = {
    "class token": tiny_vit,
    "registers": lambda: tiny_vit(reg_tokens=2),
}
ASKS_FOR_A_MEAN: dict[str, Callable[[], nn.Module]] = {
    "mean pool": lambda: tiny_vit(global_pool="avg", class_token=False),
    "CAFormer": tiny_caformer,
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The dimensions of what prune_merge is given to sort by, in each call."""
    dimensions: list[int] = []
    prune_merge = ops.prune_merge

    def record(x: Tensor, attn: Tensor, *others: Any, **options: Any) -> Any:
        dimensions.append(attn.ndim)
        return prune_merge(x, attn, *others, **options)

    monkeypatch.setattr(ops, "prune_merge", record)
    return dimensions


@pytest.mark.parametrize("kind", ASKS_FOR_ROWS)
def test_rows_where_there_is_a_kernel(kind: str, given: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = ASKS_FOR_ROWS[kind]()
    compress(model, tiny_schedule(model))
    images = tiny_images(model)
    expected = model(images)
    assert set(given) == {2}
    given.clear()
    monkeypatch.setattr(dropping, "has_kernel", lambda *heads: True)
    torch.testing.assert_close(model(images), expected)
    assert set(given) == {3}


@pytest.mark.parametrize("kind", ASKS_FOR_A_MEAN)
def test_a_mean_without_class_token(kind: str, given: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = ASKS_FOR_A_MEAN[kind]()
    compress(model, tiny_schedule(model))
    monkeypatch.setattr(dropping, "has_kernel", lambda *heads: True)
    model(tiny_images(model))
    assert set(given) == {2}


@pytest.mark.parametrize(
    ("tokens", "spares", "k_m", "dimensions"),
    [(2048, False, 9, 3), (2049, False, 9, 2), (20, True, 9, 2), (9, False, 9, 0)],
)
def test_what_a_step_asks_for(
    tokens: int, spares: bool, k_m: int, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropping, "has_kernel", lambda *heads: True)
    rules = TokenRules(1, "class", spares_most_important=spares)
    step = dropping.DropTokens(rules, k_m + 1, k_m, TokenState())
    q = torch.randn(1, 2, tokens, 4)
    step.attend(q, q, q, 0.5)
    assert (0 if step.importance is None else step.importance.ndim) == dimensions
