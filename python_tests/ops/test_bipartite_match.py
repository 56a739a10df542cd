"""bipartite_match: ToMe's matching, against the same in loops, and to within rounding of the best in every dtype."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from match_checks import check_bipartite_match
from strategies import DTYPES, HEAD_LAYOUTS, TokenCase, lay_out_heads, token_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference


@given(
    images=st.integers(0, 3),
    tokens=st.integers(1, 40),
    channels=st.integers(2, 9),  # of one channel all cosines are 1 or -1, to rounding
    prefix=st.integers(0, 5),
    kind=st.sampled_from(["normal", "few values", "NaN"]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_the_same_as_by_loops(
    device: torch.device,
    images: int,
    tokens: int,
    channels: int,
    prefix: int,
    kind: str,
    seed: int,
    data: st.DataObject,
) -> None:
    prefix = min(prefix, tokens)
    keys = keys_of(kind, (images, tokens, channels), seed)
    merged = data.draw(st.integers(0, most(tokens, prefix)))
    found = ops.bipartite_match(keys.to(device), merged, prefix=prefix).cpu()
    assert torch.equal(found, reference.bipartite_match(keys, merged, prefix=prefix))


def most(tokens: int, prefix: int) -> int:
    even, odd = (len([token for token in range(prefix, tokens) if token % 2 == parity]) for parity in (0, 1))
    return even if odd else 0


def keys_of(kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    """float64, so that rounding decides nothing; of few values: vectors along the axes, whose cosines are exact."""
    random = torch.Generator().manual_seed(seed)
    if kind == "few values":
        axis = torch.randint(shape[2], shape[:2], generator=random)
        return torch.nn.functional.one_hot(axis, shape[2]).double() * torch.tensor([2.0, -1.0])[axis % 2][..., None]
    keys = torch.randn(shape, generator=random, dtype=torch.float64)
    if kind == "NaN":
        keys[torch.rand(shape, generator=random) < 0.1] = torch.nan
    return keys


def test_by_hand(device: torch.device) -> None:
    """Of the patches 2, 4 and 6 the second and the third look like patches 1 and 5."""
    keys = torch.tensor([[9, 9], [1, 0], [1, 1], [2, 0.1], [-5, 5], [-1, 1], [0, 1]], device=device)[None]
    assert ops.bipartite_match(keys, 0).tolist() == [[0, 4, 1, 5, 2, 6, 3]]
    assert ops.bipartite_match(keys, 1).tolist() == [[0, 3, 1, 4, 5, 5, 2]]
    assert ops.bipartite_match(keys, 2).tolist() == [[0, 2, 3, 3, 4, 4, 1]]


@given(case=token_cases(), heads=st.sampled_from([None, 1, 2, 3, 6]), data=st.data())
def test_merged_tokens_are_the_most_similar(
    device: torch.device, case: TokenCase, heads: int | None, data: st.DataObject
) -> None:
    """In every dtype and layout and of every kind of values: to rounding, and of equal rows the first."""
    merged = data.draw(st.sampled_from([most(case.tokens, case.prefix), most(case.tokens, case.prefix) // 3]))
    each = [case.x(salt=head) for head in range(heads or 1)]
    keys, mean = each[0], torch.stack(each, 1).double().mean(1).to(case.dtype)
    if heads is not None:
        (keys,) = lay_out_heads([torch.stack(each, 1)], data.draw(st.sampled_from(HEAD_LAYOUTS)))
        mean = torch.stack([*keys.unbind(1)]).double().mean(0).to(case.dtype)
    slot = ops.bipartite_match(keys.to(device), merged, prefix=case.prefix).cpu()
    # a dot product of n products is off by at most n eps |u| |v|; few more roundings make it a cosine; two are compared
    rounding = 2 * (case.channels + 6) * torch.finfo(case.wide).eps
    if len(each) > 1:  # and numbers of a mean may be rounded to one side or the other
        rounding += 8 * torch.finfo(case.dtype).eps
    check_bipartite_match(mean, slot, merged, case.prefix, rounding, bits=len(each) == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_the_mean_over_heads(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    """Of numbers whose mean is exact."""
    keys = torch.randint(-4, 5, (3, 4, 70, 24), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    (keys,) = lay_out_heads([keys], layout)
    assert torch.equal(ops.bipartite_match(keys, 20), ops.bipartite_match(keys.mean(1), 20))


def test_autocast_does_not_round_the_cosines(device: torch.device) -> None:
    keys = torch.randn(4, 65, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = ops.bipartite_match(keys, 20)
    assert torch.equal(found, ops.bipartite_match(keys, 20))


def test_keys_are_constants(device: torch.device) -> None:
    keys = torch.randn(1, 9, 4, device=device, requires_grad=True)
    assert not ops.bipartite_match(keys, 3).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": 1}, InputTypeError, "keys must be a tensor (B, N, D) or (B, H, N, D), got int"),
        ({"keys": torch.ones(2, 7)}, InputValueError, "keys must be (B, N, D) or (B, H, N, D), got shape (2, 7)"),
        ({"keys": torch.ones(1, 0, 7, 3)}, InputValueError, "keys must have at least one head, got shape (1, 0, 7, 3)"),
        ({"keys": torch.ones(1, 7, 3).long()}, InputTypeError, "keys must be float32"),
        ({"merged": 4}, InputValueError, "merged must be at most 3, of 7 tokens with a prefix of 1, got 4"),
        ({"merged": -1}, InputValueError, "merged must be at least 0, got -1"),
        ({"merged": 1.0}, InputTypeError, "merged must be an int, got float"),
        ({"prefix": 8}, InputValueError, "prefix must be"),
        (
            {"prefix": 6, "merged": 1},
            InputValueError,
            "merged must be at most 0, of 7 tokens with a prefix of 6, got 1",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.bipartite_match(**{"keys": torch.ones(1, 7, 3), "merged": 2, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": torch.ones(7, 3)},
        {"keys": torch.ones(1, 0, 7, 3)},
        {"keys": torch.ones(1, 7, 3).long()},
        {"merged": 4},
        {"merged": -1},
        {"prefix": -1},
        {"prefix": 8},
        {"prefix": 6, "merged": 1},
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.bipartite_match(**{"keys": torch.ones(1, 7, 3), "merged": 2, **changes})
