"""compression_rate: kept numbers exactly, keep probabilities and gradients against the reference in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given
from strategies import seeds
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference

LOGITS = ("normal", "equal", "far apart", "large", "all but one impossible", "some impossible", "steep")


@dataclass(frozen=True)
class RateCase:
    """Logits (L, K) of proxies over the numbers of patches to keep."""

    proxies: int
    n_patches: int
    granularity: int
    prefix: int
    dtype: torch.dtype
    kind: str = "normal"
    transposed: bool = False
    seed: int = 0

    @property
    def candidates(self) -> list[int]:
        """Counted down by hand: not the way the library lists them."""
        numbers, left = [], self.n_patches
        while left > 0:
            numbers.append(left)
            left -= self.granularity
        return numbers

    @property
    def summed(self) -> float:
        """How many roundings of one sum the yardstick makes: none that count, unless it is as coarse as the kernel."""
        return float(len(self.candidates)) if self.dtype == torch.float64 else 1.0

    @property
    def options(self) -> dict[str, int]:
        return {"n_patches": self.n_patches, "granularity": self.granularity, "prefix": self.prefix}

    def logits(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        shape = (self.proxies, len(self.candidates))
        values = torch.randn(shape, generator=random, dtype=torch.float64)
        sure = torch.randint(shape[1], (shape[0], 1), generator=random)
        if self.kind == "equal":
            values = torch.full(shape, 3.0)
        elif self.kind == "far apart":
            values = 1e4 * values
        elif self.kind == "large":  # differences of which float32 keeps a few digits
            values = 1e4 + values
        elif self.kind == "all but one impossible":
            values = torch.full_like(values, -torch.inf).scatter(1, sure, 0.0)
        elif self.kind == "some impossible":
            values = torch.where(values < 0, -torch.inf, values).scatter(1, sure, 0.5)
        elif self.kind == "steep":
            values = values + torch.linspace(0, 60, shape[1])
        values = values.to(self.dtype)
        return values.t().contiguous().t() if self.transposed else values

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of kept and keep_probability."""
        random = torch.Generator().manual_seed(self.seed + 1)
        tokens = self.n_patches + self.prefix
        kept = torch.randn(self.proxies, generator=random)
        return kept.to(self.dtype), torch.randn(self.proxies, tokens, generator=random).to(self.dtype)


@st.composite
def rate_cases(draw: st.DrawFn) -> RateCase:
    n_patches = draw(st.sampled_from((1, 2, 3, 16, 49, 196, 257, 1024)))
    return RateCase(
        proxies=draw(st.sampled_from((1, 2, 5, 22, 0))),
        n_patches=n_patches,
        granularity=draw(st.sampled_from((1, 2, 3, 7, 16, n_patches, n_patches + 3))),
        prefix=draw(st.sampled_from((1, 0, 2, 5))),
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        kind=draw(st.sampled_from(LOGITS)),
        transposed=draw(st.booleans()),
        seed=draw(seeds),
    )


@given(case=rate_cases())
def test_results(device: torch.device, case: RateCase) -> None:
    logits = case.logits()
    kept, keep_prob = ops.compression_rate(logits.to(device), **case.options)
    assert keep_prob.is_contiguous()
    candidates = torch.tensor(case.candidates, dtype=torch.float64)
    mean = (logits.double().softmax(-1) * candidates).sum(-1)

    # a mean within rounding of a whole number may be rounded up to the next
    rounding = 4 * torch.finfo(case.dtype).eps * case.n_patches
    least, most = (mean - rounding).ceil() + case.prefix, (mean + rounding).ceil() + case.prefix
    assert kept.dtype == case.dtype
    assert kept.shape == (case.proxies,)
    kept = kept.cpu().double()
    assert_same("kept: a whole number", kept, kept.round())
    assert ((kept >= least) & (kept <= most)).all(), f"kept {kept.tolist()}, mean {mean.tolist()} + {case.prefix}"

    assert_as_accurate_as_eager(
        "keep_probability",
        keep_prob,
        lambda logits: reference.compression_rate(logits, **case.options)[1],
        [logits],
        dtype=case.dtype,
        terms=torch.full(keep_prob.shape, case.summed),
    )


@given(case=rate_cases())
def test_gradients(device: torch.device, case: RateCase) -> None:
    logits = case.logits().to(device).requires_grad_()
    grad_kept, grad_prob = case.gradients()
    outputs = ops.compression_rate(logits, **case.options)
    (gradient,) = torch.autograd.grad(outputs, logits, [grad_kept.to(device), grad_prob.to(device)])
    assert_as_accurate_as_eager(
        "gradient of logits",
        gradient,
        gradient_of(reference.compression_rate, case),
        [logits, grad_kept, grad_prob],
        dtype=case.dtype,
        terms=case.summed * gradient_terms(case),
    )


def gradient_of(function: Callable[..., Any], case: RateCase) -> Callable[..., Tensor]:
    def compute(logits: Tensor, grad_kept: Tensor, grad_prob: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, **case.options), leaf, [grad_kept, grad_prob])[0]

    return compute


def gradient_terms(case: RateCase) -> Tensor:
    """Magnitudes of what is added up and taken off: p_k (dp_k - sum_l p_l dp_l)."""
    p = case.logits().double().softmax(-1)
    grad_kept, grad_prob = (gradient.double().abs() for gradient in case.gradients())
    running = torch.cat([torch.zeros(case.proxies, 1, dtype=torch.float64), grad_prob.cumsum(1)], 1)
    candidates = torch.tensor(case.candidates)
    to_p = running[:, candidates + case.prefix] + grad_kept[:, None] * candidates
    return p * (to_p + (p * to_p).sum(-1, keepdim=True))


def test_by_hand(device: torch.device) -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], dtype=torch.float64, device=device)
    logits = p.log().requires_grad_()
    kept, keep_prob = ops.compression_rate(logits, 5, 2, 1)  # candidates 5, 3, 1
    assert kept.tolist() == [5.0, 3.0]  # means 3.5 and 1.75, rounded up, and the prefix
    expected = torch.tensor([[1, 1, 0.75, 0.75, 0.5, 0.5], [1, 1, 0.25, 0.25, 0.125, 0.125]], dtype=torch.float64)
    torch.testing.assert_close(keep_prob.cpu(), expected)
    (gradient,) = torch.autograd.grad(kept.sum(), logits, retain_graph=True)
    expected = p * (torch.tensor([5.0, 3, 1], device=device) - torch.tensor([[3.5], [1.75]], device=device))
    torch.testing.assert_close(gradient, expected)  # as if nothing had been rounded up
    (gradient,) = torch.autograd.grad(keep_prob[0, 4], logits)
    expected = torch.tensor([[0.25, -0.125, -0.125], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(gradient.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_equal_logits_keep_the_mean_of_the_candidates(device: torch.device, dtype: torch.dtype, level: float) -> None:
    """Where every search begins; a whole number is not rounded up past itself."""
    for n_patches in (1, 2, 3, 7, 16, 49, 196, 197, 256, 576):
        for granularity in (1, 2, 3, 10, n_patches):
            case = RateCase(2, n_patches, granularity, 1, dtype)
            logits = torch.full((2, len(case.candidates)), level, dtype=dtype, device=device)
            kept, _ = ops.compression_rate(logits, n_patches, granularity)
            expected = ceil(Fraction(sum(case.candidates), len(case.candidates))) + 1
            assert kept.tolist() == [expected] * 2, f"{n_patches} patches, granularity {granularity}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sure", [1e4, torch.inf])
def test_a_sure_choice_is_kept_exactly(device: torch.device, dtype: torch.dtype, sure: float) -> None:
    case = RateCase(0, 50, 3, 2, dtype)
    count = len(case.candidates)
    logits = torch.where(torch.eye(count, device=device) > 0, 0.0, -sure).to(dtype).requires_grad_()
    kept, keep_prob = ops.compression_rate(logits, **case.options)
    assert kept.tolist() == [number + 2 for number in case.candidates]
    position = torch.arange(52)
    expected = torch.stack([(position < number + 2) for number in case.candidates]).to(dtype)
    assert_same("keep_probability", keep_prob, expected)
    (gradient,) = torch.autograd.grad(kept.sum() + keep_prob.square().sum(), logits)
    assert_same("gradient", gradient, torch.zeros(count, count, dtype=dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_distribution_stays_in_its_row(device: torch.device, bad: float) -> None:
    """As by softmax: NaN, and in no other row."""
    logits = torch.randn(3, 8, device=device)
    clean = ops.compression_rate(logits, 8)
    for place in (0, 5):
        spoiled = logits.clone()
        spoiled[1, place] = bad
        spoiled.requires_grad_()
        outputs = ops.compression_rate(spoiled, 8)
        (gradient,) = torch.autograd.grad([out.sum() for out in outputs], spoiled)
        for out, before in zip(outputs, clean, strict=True):
            assert out[1].isnan().all()
            assert_same("other rows", out[[0, 2]], before[[0, 2]])
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


def test_one_candidate_keeps_everything(device: torch.device) -> None:
    logits = torch.randn(3, 1, device=device, requires_grad=True)
    kept, keep_prob = ops.compression_rate(logits, 9, 9, 1)
    assert kept.tolist() == [10, 10, 10]
    assert_same("keep_probability", keep_prob, torch.ones(3, 10))
    (gradient,) = torch.autograd.grad(kept.sum() + keep_prob.square().sum(), logits)
    assert_same("gradient", gradient, torch.zeros(3, 1))


@pytest.mark.parametrize("granularity", [1, 3])
def test_gradcheck(device: torch.device, granularity: int) -> None:
    """Of the keep probability. kept jumps: see test_by_hand for its gradient."""
    case = RateCase(3, 10, granularity, 2, torch.float64)
    logits = case.logits().to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: ops.compression_rate(logits, **case.options)[1], [logits])


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(device: torch.device, used: int) -> None:
    case = RateCase(3, 10, 3, 1, torch.float64)
    leaf, other = case.logits().to(device).requires_grad_(), case.logits().requires_grad_()
    gradient = case.gradients()[used]
    ops.compression_rate(leaf, **case.options)[used].backward(gradient.to(device))
    reference.compression_rate(other, **case.options)[used].backward(gradient)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), other.grad)


def test_a_second_backward_raises(device: torch.device) -> None:
    leaf = RateCase(2, 10, 3, 1, torch.float64).logits().to(device).requires_grad_()
    kept, keep_prob = ops.compression_rate(leaf, 10, 3)
    (first,) = torch.autograd.grad(kept.sum() + keep_prob.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), leaf)


def test_no_gradient_is_asked_for(device: torch.device) -> None:
    for result in ops.compression_rate(torch.zeros(2, 4, device=device), 4):
        assert not result.requires_grad


LOGITS_4 = torch.zeros(2, 4)
GOOD: dict[str, Any] = {"logits": LOGITS_4, "n_patches": 8, "granularity": 2}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": None}, InputTypeError, "logits must be a tensor (L, K), got NoneType"),
        ({"logits": LOGITS_4[0]}, InputValueError, "logits must be (L, K), got shape (4,)"),
        ({"logits": LOGITS_4.int()}, InputTypeError, "logits must be float32"),
        ({"logits": LOGITS_4.half()}, InputTypeError, "logits must be float32 or float64, got torch.float16"),
        (
            {"logits": LOGITS_4[:, :3]},
            InputValueError,
            "each of the 4 candidates (n_patches 8, granularity 2), got shape (2",
        ),
        (
            {"granularity": 3},
            InputValueError,
            "each of the 3 candidates (n_patches 8, granularity 3), got shape",
        ),
        ({"n_patches": 9}, InputValueError, "each of the 5 candidates (n_patches 9, granularity 2), got shape (2, 4)"),
        ({"n_patches": 0}, InputValueError, "n_patches must be at least 1, got 0"),
        ({"n_patches": 8.0}, InputTypeError, "n_patches must be an int, got float"),
        ({"granularity": 0}, InputValueError, "granularity must be at least 1, got 0"),
        ({"granularity": True}, InputTypeError, "granularity must be an int, got bool"),
        ({"prefix": -1}, InputValueError, "prefix must be at least 0, got -1"),
        ({"prefix": None}, InputTypeError, "prefix must be an int, got NoneType"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.compression_rate(**{**GOOD, **changes})


GRADS: dict[str, Any] = {"grad_kept": torch.zeros(2), "grad_keep_prob": torch.zeros(2, 9), "prefix": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": LOGITS_4[0]},
        {"logits": LOGITS_4.half()},
        {"logits": LOGITS_4[:, :3]},
        {"n_patches": 0},
        {"n_patches": -8},
        {"n_patches": 2**62},
        {"granularity": 0},
        {"granularity": -1},
        {"prefix": -1},
        {"grad_kept": torch.zeros(1)},
        {"grad_kept": torch.zeros(2, 1)},
        {"grad_kept": torch.zeros(2).double()},
        {"grad_keep_prob": torch.zeros(2, 8)},
        {"grad_keep_prob": torch.zeros(2, 9).half()},
    ],
)
def test_the_operators_check_for_themselves(changes: dict[str, Any]) -> None:
    arguments = {**GOOD, **GRADS, **changes}
    with pytest.raises(RuntimeError, match="diffrate: "):
        torch.ops.diffrate.compression_rate_backward(**arguments)
    if not any(name.startswith("grad_") for name in changes):
        with pytest.raises(RuntimeError, match="diffrate: "):
            torch.ops.diffrate.compression_rate(**{name: arguments[name] for name in ("prefix", *GOOD)})
