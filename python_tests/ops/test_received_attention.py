"""received_attention: the column means of the attention map."""

from __future__ import annotations

import re
from typing import Any

import attention_checks
import pytest
import torch
from compare import assert_same
from hypothesis import given
from strategies import AttentionCase, attention_cases

from diffrate_ext import ops, reference


@given(case=attention_cases())
def test_accuracy(device: torch.device, case: AttentionCase) -> None:
    attention_checks.check_accuracy(ops.received_attention, reference.received_attention, case, device)


@pytest.mark.parametrize(
    "check",
    [
        attention_checks.check_sizes,
        attention_checks.check_large_logits,
        attention_checks.check_nan_stays_in_its_image,
        attention_checks.check_no_images,
    ],
)
def test_special_values(device: torch.device, check: Any) -> None:
    check(ops.received_attention, device)


def test_all_attention_is_received(device: torch.device) -> None:
    q, k = torch.randn(2, 2, 3, 65, 8, device=device)
    size = 1 + torch.rand(2, 65, device=device)
    total = ops.received_attention(q, k, size).sum(1)
    torch.testing.assert_close(total.cpu(), torch.ones(2))
    part = ops.received_attention(q, k, size, prefix=5)
    assert_same("importance of the patches", part, ops.received_attention(q, k, size)[:, 5:])


def test_every_token_asks(device: torch.device) -> None:
    """One query at a time: its row of the map is what the result changes by."""
    q, k = torch.zeros(1, 1, 7, 4, device=device), torch.randn(1, 1, 7, 4, device=device)
    uniform = 1 / 7
    for query in range(7):
        asking = q.clone()
        asking[0, 0, query] = 3.0
        row = (3.0 * k[0, 0].sum(1) * 4**-0.5).softmax(0)
        expected = (6 * uniform + row) / 7
        torch.testing.assert_close(ops.received_attention(asking, k)[0], expected)


def test_equal_keys_share_equally(device: torch.device) -> None:
    q, k = torch.randn(1, 2, 8, 4, device=device), torch.zeros(1, 2, 8, 4, device=device)
    assert_same("importance", ops.received_attention(q, k), torch.full((1, 8), 1 / 8))


@pytest.mark.parametrize(("changes", "error", "message"), attention_checks.ERRORS)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.received_attention(**{"q": attention_checks.Q, "k": attention_checks.Q, **changes})


@pytest.mark.parametrize("arguments", attention_checks.RAW_ERRORS)
def test_the_operator_checks_for_itself(arguments: tuple) -> None:
    attention_checks.check_raw_error(torch.ops.diffrate.received_attention, arguments)
