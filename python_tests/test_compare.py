"""The comparisons themselves: each passes what is right, and fails with the worst place what is not."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same, assert_within, eager_error, rounding_noise
from match_checks import check_matches, first_of_equals
from oracles import cosines, sorted_positions
from strategies import DTYPES, FEATURES, TokenCase

NAN, INF = float("nan"), float("inf")


def test_same_takes_equal_tensors() -> None:
    assert_same("x", torch.tensor([1.0, NAN, INF, -0.0]), torch.tensor([1.0, NAN, INF, 0.0]))
    assert_same("x", torch.empty(0, 3), torch.empty(0, 3))


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (
            [[1.0, 2.0], [3.0, 5.0]],
            [[1.0, 2.0], [3.0, 4.0]],
            r"x: 1 of 4 values differ, first at \(1, 1\): got 5.0, expected 4.0",
        ),
        ([1.0, NAN], [1.0, 2.0], r"first at \(1,\): got nan, expected 2.0"),
        ([1.0, 2.0], [1.0, NAN], r"got 2.0, expected nan"),
        ([INF], [-INF], r"got inf, expected -inf"),
        ([1, 2], [1.0, 2.0], r"got torch.int64 of shape \(2,\), expected torch.float32"),
        ([1.0], [1.0, 1.0], r"of shape \(1,\), expected torch.float32 of shape \(2,\)"),
    ],
)
def test_same_names_the_first_difference(actual: list, expected: list, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same("x", torch.tensor(actual), torch.tensor(expected))


def test_within_takes_what_is_near() -> None:
    reference = torch.tensor([1.0, NAN, INF, -INF])
    assert_within("x", torch.tensor([1.25, NAN, INF, -INF]), reference, 0.25)
    assert_within("x", torch.empty(0), torch.empty(0), 0.0)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (
            [[0.0, 0.0], [0.75, -2.0]],
            r"x: worst at \(1, 1\): got -2.0, expected 0.0, off by 2.000e\+00, allowed 5.000e-01; 2 of 4",
        ),
        ([[0.0, NAN], [9.0, 0.0]], r"worst at \(0, 1\): got nan, expected 0.0"),
        ([[0.0, INF], [0.0, 0.0]], r"worst at \(0, 1\): got inf, expected 0.0"),
    ],
)
def test_within_names_the_worst_place(actual: list, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_within("x", torch.tensor(actual), torch.zeros(2, 2), 0.5)


@pytest.mark.parametrize("expected", [NAN, INF, -INF])
def test_within_wants_special_values_in_their_places(expected: float) -> None:
    with pytest.raises(AssertionError, match=r"worst at \(0,\): got 1.0"):
        assert_within("x", torch.tensor([1.0]), torch.tensor([expected]), 1e30)


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_eager_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    x = torch.randn(8, 100, dtype=torch.float64).to(dtype)
    assert_as_accurate_as_eager("mean", mean(x), mean, [x], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_error_of_ten_roundings_is_too_much(dtype: torch.dtype) -> None:
    x = torch.rand(8, 100, dtype=torch.float64).to(dtype)
    wrong = mean(x)
    wrong[5] += 10 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"worst at \(5,\)"):
        assert_as_accurate_as_eager("mean", wrong, mean, [x], dtype=dtype)


def test_units_make_small_values_count() -> None:
    x = torch.rand(2, 100) * torch.tensor([[1.0], [1e30]])
    wrong = mean(x)
    wrong[0] += 0.01
    assert_as_accurate_as_eager("mean", wrong, mean, [x], dtype=torch.float32)  # hidden by the large one
    with pytest.raises(AssertionError, match=r"worst at \(0,\)"):
        assert_as_accurate_as_eager("mean", wrong, mean, [x], dtype=torch.float32, per=x.amax(1))


def test_terms_that_cancel_leave_their_rounding() -> None:
    x = torch.full((2, 4), 0.1)
    zero = x.mean(1) - x.mean(1)
    wrong = zero + torch.finfo(torch.float32).eps / 16
    with pytest.raises(AssertionError, match=r"allowed 2\.351e-38"):
        assert_as_accurate_as_eager("x", wrong, lambda x: mean(x) - mean(x), [x], dtype=torch.float32)
    assert_as_accurate_as_eager("x", wrong, lambda x: mean(x) - mean(x), [x], dtype=torch.float32, terms=mean(x))
    with pytest.raises(AssertionError, match="x: worst"):
        assert_as_accurate_as_eager(
            "x", 64 * wrong, lambda x: mean(x) - mean(x), [x], dtype=torch.float32, terms=mean(x)
        )


def test_the_dtype_counts() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(AssertionError, match=r"got torch.float64 of shape \(2,\), expected torch.float32"):
        assert_as_accurate_as_eager("mean", mean(x.double()), mean, [x], dtype=torch.float32)


def test_the_measured_errors_have_the_size_of_roundings() -> None:
    x = torch.rand(8, 100)
    eps = torch.finfo(torch.float32).eps
    assert 0 < eager_error(mean, [x], torch.ones(())) < 4 * eps
    assert eps / 8 < rounding_noise(torch.rand(1000).double(), torch.float32) < 1.01 * eps
    assert rounding_noise(torch.zeros(4), torch.float32) == torch.finfo(torch.float32).tiny


def test_the_sorting_oracle() -> None:
    importance = torch.tensor([[0.0, NAN, INF, -0.0, 2.0, -INF, 2.0, NAN]])
    assert sorted_positions(importance, 2).tolist() == [[0, 1, 4, 6, 8, 2, 5, 7, 3, 9]]


# --- the check of matches: sources at positions 30 .., destinations before them


def right_matches(case: TokenCase) -> torch.Tensor:
    x = case.x()
    best = cosines(x)[:, 30:, case.prefix : 30].nan_to_num(nan=-torch.inf).argmax(2)
    return first_of_equals(x[:, case.prefix : 30]).gather(1, best) + case.prefix


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_matches_pass(features: str, dtype: torch.dtype) -> None:
    case = TokenCase(2, 65, 8, 1, dtype, features=features)
    check_matches(case, case.x(), right_matches(case), 30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", ["codebook", "duplicates"])
def test_the_second_of_two_equal_destinations_is_found(features: str, dtype: torch.dtype) -> None:
    case = TokenCase(2, 65, 8, 1, dtype, features=features)
    x, match = case.x(), right_matches(case)
    first, seconds = first_of_equals(x[:, 1:30]) + 1, 0
    for image, source in torch.ones_like(match).nonzero().tolist():
        equal = (first[image] == match[image, source]).nonzero().flatten() + 1
        for second in equal[1:2].tolist():
            wrong = match.clone()
            wrong[image, source] = second
            with pytest.raises(AssertionError, match="equal bit for bit: 1 of 70 values differ"):
                check_matches(case, x, wrong, 30)
            seconds += 1
    assert seconds > 20


def test_a_destination_that_is_less_similar_is_found() -> None:
    case = TokenCase(2, 65, 8, 1, torch.float32)
    wrong = right_matches(case)
    wrong[1, 20] = 1 + int(cosines(case.x())[1, 50, 1:30].argmin())
    with pytest.raises(AssertionError, match="a destination less similar by"):
        check_matches(case, case.x(), wrong, 30)


@pytest.mark.parametrize("position", [0, 30])
def test_what_is_no_destination_is_found(position: int) -> None:
    case = TokenCase(2, 65, 8, 1, torch.float32)
    wrong = right_matches(case)
    wrong[0, 3] = position
    with pytest.raises(AssertionError):
        check_matches(case, case.x(), wrong, 30)


def test_equal_is_equal_bit_for_bit() -> None:
    """Rounding is free to choose between rows that point the same way, and zeros of both signs differ."""
    rows = [[9.0, 9], [1, 0], [1, -0.0], [2, 0], [1, 0], [1, -0.0], [2, 0]]
    x = torch.tensor([[*rows, [3.0, 0.0]]])
    assert first_of_equals(x).tolist() == [[0, 1, 2, 3, 1, 2, 3, 7]]
    case = TokenCase(1, 8, 2, 1, torch.float32)
    for destination in (1, 2, 3):
        check_matches(case, x, torch.tensor([[destination]]), 7)
        with pytest.raises(AssertionError, match=f"got {destination + 3}, expected {destination}"):
            check_matches(case, x, torch.tensor([[destination + 3]]), 7)


def test_what_is_similar_to_nothing_goes_to_the_first() -> None:
    x = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [NAN, 1]]])
    case = TokenCase(1, 4, 2, 1, torch.float32)
    check_matches(case, x, torch.tensor([[1]]), 3)
    with pytest.raises(AssertionError, match="similar to nothing"):
        check_matches(case, x, torch.tensor([[2]]), 3)
