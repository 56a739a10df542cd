"""class_attention: the class token's row of the attention map."""

from __future__ import annotations

import re
from typing import Any

import attention_checks
import pytest
import torch
from compare import assert_same
from hypothesis import given
from strategies import AttentionCase, attention_cases

from diffrate_ext import InputValueError, ops, reference


@given(case=attention_cases(least_prefix=1))
def test_accuracy(device: torch.device, case: AttentionCase) -> None:
    attention_checks.check_accuracy(ops.class_attention, reference.class_attention, case, device)


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
    check(ops.class_attention, device)


def test_only_the_class_token_asks(device: torch.device) -> None:
    q, k = torch.randn(2, 2, 3, 17, 8, device=device)
    other = torch.cat([q[:, :, :1], torch.randn_like(q[:, :, 1:])], 2)
    assert_same("importance", ops.class_attention(q, k, prefix=3), ops.class_attention(other, k, prefix=3))


def test_equal_keys_share_equally(device: torch.device) -> None:
    q, k = torch.randn(1, 2, 8, 4, device=device), torch.zeros(1, 2, 8, 4, device=device)
    assert_same("importance", ops.class_attention(q, k), torch.full((1, 7), 1 / 8))


def test_no_patches(device: torch.device) -> None:
    assert ops.class_attention(*torch.randn(2, 3, 2, 4, 8, device=device), prefix=4).shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *attention_checks.ERRORS,
        ({"prefix": 0}, InputValueError, "prefix must be at least 1 (index 0 is the class token), got 0"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.class_attention(**{"q": attention_checks.Q, "k": attention_checks.Q, **changes})


@pytest.mark.parametrize("arguments", attention_checks.RAW_ERRORS)
def test_the_operator_checks_for_itself(arguments: tuple) -> None:
    attention_checks.check_raw_error(torch.ops.diffrate.class_attention, arguments)
