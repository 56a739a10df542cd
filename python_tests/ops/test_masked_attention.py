"""masked_attention: values against the reference in float64, what masks mean, that no attention map is ever kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import attention_checks
import pytest
import torch
from attention_checks import LargestTensor
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given
from masked_attention_calls import TINY, Magnitudes, calls, reference_of
from strategies import DTYPES, HEAD_LAYOUTS, AttentionCase, wide
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference


@given(call=calls())
def test_accuracy(device: torch.device, call: tuple[AttentionCase, str, str]) -> None:
    case, mask_kind, importance_from = call
    q, k, v = case.qkv()
    mask, size = case.mask(mask_kind), case.size()
    inputs = [q, k, v, mask, size]
    out, importance = ops.masked_attention(
        *case.qkv(device),
        case.mask(mask_kind, device),
        case.size(device),
        scale=case.scale,
        prefix=case.prefix,
        importance_from=importance_from,
    )
    compute, magnitudes = reference_of(case, importance_from), Magnitudes(case, q, k, mask, size)
    assert_as_accurate_as_eager(
        "out", out, lambda *args: compute(*args)[0], inputs, dtype=case.dtype, terms=magnitudes.out(v)
    )
    assert not importance.requires_grad
    assert importance.is_contiguous()
    assert_as_accurate_as_eager(
        "importance",
        importance,
        lambda *args: compute(*args)[1],
        inputs,
        dtype=wide(case.dtype),
        terms=magnitudes.importance(importance_from),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", DTYPES)
def test_masks_of_another_dtype(device: torch.device, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    case = AttentionCase(2, 2, 17, 8, 1, dtype)
    q, k, v = case.qkv(device)
    mask = case.mask("random", device).to(mask_dtype).requires_grad_()
    out, importance = ops.masked_attention(q, k, v, mask)
    assert out.dtype == dtype
    assert importance.dtype == wide(dtype)
    out.sum().backward()
    assert mask.grad is not None
    assert mask.grad.dtype == mask_dtype
    assert_same("out", out, ops.masked_attention(q, k, v, mask.detach().to(wide(dtype)))[0])


# --- what masks mean


@pytest.mark.parametrize("importance_from", ["class", "received"])
def test_nothing_masked_is_proportional_attention(device: torch.device, importance_from: Any) -> None:
    case = AttentionCase(2, 3, 65, 16, 1, torch.float64, "packed qkv", "random")
    (q, k, v), size = case.qkv(device), case.size(device)
    ones = torch.ones(2, 65, dtype=torch.float64, device=device)
    out, measured = ops.masked_attention(q, k, v, ones, size, importance_from=importance_from)
    expected, expected_importance = ops.proportional_attention(q, k, v, size, importance_from=importance_from)
    bound = 1e-5  # of the epsilon, beside an exponential of at least 1
    torch.testing.assert_close(out, expected, atol=bound, rtol=0)
    torch.testing.assert_close(measured, expected_importance, atol=bound, rtol=0)


@pytest.mark.parametrize("importance_from", ["class", "received"])
def test_masked_tokens_are_as_if_dropped(device: torch.device, importance_from: Any) -> None:
    """What the search step promises: the others see, and are measured, as at inference, where masked ones are gone."""
    case = AttentionCase(2, 3, 33, 16, 1, torch.float64, sizes="random")
    (q, k, v), size = case.qkv(device), case.size(device)
    assert size is not None
    alive = torch.arange(33) % 3 != 1
    alive[0] = True
    mask = alive.double().expand(2, -1).to(device)
    out, measured = ops.masked_attention(q, k, v, mask, size, importance_from=importance_from)
    kept = [tensor[:, :, alive] for tensor in (q, k, v)]
    expected, expected_importance = ops.proportional_attention(*kept, size[:, alive], importance_from=importance_from)
    bound = 1e-4  # the largest exponential may belong to a masked token, beside which the epsilon is larger
    torch.testing.assert_close(out[:, :, alive], expected, atol=bound, rtol=0)
    assert expected_importance is not None
    torch.testing.assert_close(measured[:, alive[1:]], expected_importance, atol=bound, rtol=0)
    assert (measured[:, ~alive[1:]] < 1e-5).all()
    assert (measured[:, ~alive[1:]] >= 0).all()


def test_a_masked_token_sees_itself(device: torch.device) -> None:
    q = torch.ones(1, 2, 6, 4, device=device)
    v = torch.randn(1, 2, 6, 4, device=device)
    out, _ = ops.masked_attention(q, q, v, torch.zeros(1, 6, device=device))
    torch.testing.assert_close(out, v, atol=1e-5, rtol=1e-5)
    mask = torch.tensor([[1.0, 0, 0, 0, 0, 0]], device=device)
    out, importance = ops.masked_attention(q, q, v, mask)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, :, 4], (v[:, :, 0] + v[:, :, 4]) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(importance, torch.full((1, 5), 1e-6 / 6, device=device))


def test_the_own_mask_of_a_token_has_no_effect_on_it(device: torch.device) -> None:
    """... and so no gradient: a token sees itself whatever its mask."""
    case = AttentionCase(1, 2, 5, 3, 1, torch.float64)
    q, k, v = case.qkv(device)
    for token in range(5):
        mask = torch.zeros(1, 5, dtype=torch.float64, device=device, requires_grad=True)
        out, _ = ops.masked_attention(q, k, v, mask)
        (gradient,) = torch.autograd.grad(out[:, :, token].sum(), mask)
        assert float(gradient[0, token]) == 0.0
        assert int(gradient.count_nonzero()) == 4


def test_nobody_left_to_receive_from(device: torch.device) -> None:
    case = AttentionCase(2, 2, 6, 4, 0, torch.float32)
    q, k, v = case.qkv(device)
    mask = torch.ones(2, 6, device=device)
    mask[1] = 0
    _, importance = ops.masked_attention(q, k, v, mask, prefix=0, importance_from="received")
    assert_same("importance", importance[1], torch.zeros(6))
    torch.testing.assert_close(importance[0].sum().cpu(), torch.tensor(1.0))


def test_a_size_counts_as_so_many_tokens(device: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 8, device=device)
    size, mask = torch.ones(2, 6, device=device), torch.ones(2, 6, device=device)
    size[:, 4], mask[:, 2] = 3, 0
    out, importance = ops.masked_attention(q, k, v, mask, size)
    index = torch.tensor([0, 1, 3, 4, 4, 4, 5], device=device)
    attn = (q @ k[:, :, index].transpose(-1, -2) * 8**-0.5).softmax(-1)
    alive = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[:, :, alive], (attn @ v[:, :, index])[:, :, alive], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(importance[:, 3], attn[:, :, 0, 3:6].sum(-1).mean(1), atol=1e-4, rtol=1e-4)


# --- special values


@pytest.mark.parametrize("small", [0.0, -0.0, -1.0, -torch.inf, TINY / 2])
def test_a_size_without_a_logarithm_counts_as_the_smallest_float(device: torch.device, small: float) -> None:
    case = AttentionCase(2, 2, 17, 8, 1, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (*case.qkv(device), case.mask("random", device))]
    results = []
    for value in (small, TINY):
        size = torch.ones(2, 17, device=device)
        size[:, 5] = value
        out, importance = ops.masked_attention(*leaves, size)
        results.append([out, importance, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert_same("result", a, b)
        assert a.isfinite().all()


def test_no_size_is_size_one(device: torch.device) -> None:
    case = AttentionCase(2, 2, 17, 8, 1, torch.float32)
    inputs = [*case.qkv(device), case.mask("random", device)]
    bare, with_ones = ops.masked_attention(*inputs), ops.masked_attention(*inputs, torch.ones(2, 17, device=device))
    for a, b in zip(bare, with_ones, strict=True):
        assert_same("result", a, b)


@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30])
@pytest.mark.parametrize("importance_from", ["class", "received"])
def test_large_logits(device: torch.device, scale: float, importance_from: Any) -> None:
    case = AttentionCase(2, 3, 33, 16, 1, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (*case.qkv(device), case.mask("random", device))]
    out, measured = ops.masked_attention(*leaves, scale=scale, importance_from=importance_from)
    assert out.isfinite().all()
    assert ((measured >= 0) & (measured <= 1 + 1e-5)).all()
    for gradient in torch.autograd.grad(out.sum(), leaves[2:]):
        assert gradient.isfinite().all()


def test_nan_stays_in_its_image(device: torch.device) -> None:
    case = AttentionCase(3, 2, 17, 8, 1, torch.float32)
    q, k, v = case.qkv(device)
    mask = case.mask("random", device)
    clean = ops.masked_attention(q, k, v, mask)
    q[1, :, 0, 3] = torch.nan
    out, importance = ops.masked_attention(q, k, v, mask)
    assert_same("other images", out[[0, 2]], clean[0][[0, 2]])
    assert_same("other tokens", out[1, :, 1:], clean[0][1, :, 1:])
    assert out[1, :, 0].isnan().all()
    assert importance[1].isnan().all()
    assert_same("importance of other images", importance[[0, 2]], clean[1][[0, 2]])


@pytest.mark.parametrize("importance_from", ["class", "received"])
def test_no_images(device: torch.device, importance_from: Any) -> None:
    q = torch.zeros(0, 2, 5, 4, device=device, requires_grad=True)
    mask = torch.ones(0, 5, device=device, requires_grad=True)
    out, measured = ops.masked_attention(
        q, q, q, mask, torch.ones(0, 5, device=device), importance_from=importance_from
    )
    assert out.shape == (0, 2, 5, 4)
    assert measured.shape == (0, 4)
    out.sum().backward()
    assert mask.grad is not None
    assert mask.grad.shape == (0, 5)


def test_no_patches(device: torch.device) -> None:
    q = torch.randn(2, 2, 3, 4, device=device)
    assert ops.masked_attention(q, q, q, torch.ones(2, 3, device=device), prefix=3)[1].shape == (2, 0)


# --- memory


@pytest.mark.parametrize("layout", HEAD_LAYOUTS[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_ready_for_the_projection(device: torch.device, layout: str, dtype: torch.dtype) -> None:
    case = AttentionCase(2, 3, 65, 16, 1, dtype, layout, "random")
    out, _ = ops.masked_attention(*case.qkv(device), case.mask("random", device), case.size(device))
    assert out.transpose(1, 2).is_contiguous()


TOKENS = 601  # large beside what is legitimately there: H * N * D elements are a tenth of N * N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("importance_from", ["class", "received"])
def test_no_attention_map_is_built_or_kept(dtype: torch.dtype, importance_from: Any) -> None:
    case = AttentionCase(1, 2, TOKENS, 16, 1, dtype, "packed qkv", "random")
    leaves = [tensor.requires_grad_() for tensor in (*case.qkv(), case.mask("random"))]
    largest, kept = train_and_watch(ops.masked_attention, leaves, case.size(), importance_from)
    assert 0 < kept <= 2 * TOKENS * 16, f"{kept} elements of one tensor are kept for the backward"
    assert 0 < largest.elements < TOKENS * TOKENS / 2, f"{largest.operator} returned {largest.elements} elements"


def test_the_recorders_see_an_attention_map() -> None:
    case = AttentionCase(1, 2, TOKENS, 16, 1, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (*case.qkv(), case.mask("random"))]
    largest, kept = train_and_watch(reference.masked_attention, leaves, None, "class")
    assert largest.elements == kept == 2 * TOKENS * TOKENS


def train_and_watch(
    operator: Callable[..., Any], leaves: list[Tensor], size: Tensor | None, importance_from: str
) -> tuple[LargestTensor, int]:
    """The largest tensor that was made forward or backward, and the elements of the largest kept in between."""
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out, _ = operator(*leaves, size, importance_from=importance_from)
        out.backward(torch.ones_like(out))
    return largest, max(kept)


# --- errors

Q = attention_checks.Q
MASK = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *attention_checks.ERRORS,
        ({"v": None}, InputTypeError, "v must be a tensor (B, H, N, D), got NoneType"),
        ({"v": Q[..., :3]}, InputValueError, "v must be the shape of q = (2, 3, 6, 4), got shape (2, 3, 6, 3)"),
        ({"v": Q.half()}, InputTypeError, "v is torch.float16 and q torch.float32"),
        ({"v": Q.to("meta")}, InputValueError, "v is on meta and q on cpu"),
        ({"mask": None}, InputTypeError, "mask must be a tensor (B, N), got NoneType"),
        ({"mask": MASK[0]}, InputValueError, "mask must be (B, N), got shape (6,)"),
        ({"mask": MASK[:, :5]}, InputValueError, "mask must be (B, N) = (2, 6), got shape (2, 5)"),
        ({"mask": MASK[:1]}, InputValueError, "mask must be (B, N) = (2, 6), got shape (1, 6)"),
        ({"mask": MASK.bool()}, InputTypeError, "mask must be float32, float16, bfloat16 or float64, got torch.bool"),
        ({"mask": MASK.to("meta")}, InputValueError, "mask is on meta and q on cpu"),
        ({"importance_from": "cls"}, InputValueError, "importance_from must be one of 'class', 'received', got 'cls'"),
        ({"importance_from": None}, InputValueError, "importance_from must be one of 'class', 'received', got None"),
        (
            {"mask_gradient": "slope"},
            InputValueError,
            "mask_gradient must be one of 'derivative', 'difference', got 'slope'",
        ),
        ({"prefix": 0}, InputValueError, "prefix must be at least 1 (index 0 is the class token), got 0"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.masked_attention(**{"q": Q, "k": Q, "v": Q, "mask": MASK, **changes})


RAW: dict[str, Any] = {"q": Q, "k": Q, "v": Q, "mask": MASK, "size": None, "scale": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"q": Q[0]},
        {"q": Q.long(), "k": Q.long(), "v": Q.long()},
        {"k": Q[:, :, :5]},
        {"k": Q[:1]},
        {"v": Q[..., :3]},
        {"v": Q.half()},
        {"q": Q[:, :0], "k": Q[:, :0], "v": Q[:, :0]},
        {"q": Q[..., :0], "k": Q[..., :0], "v": Q[..., :0]},
        {"mask": MASK[0]},
        {"mask": MASK[:, :5]},
        {"mask": MASK[:1]},
        {"mask": MASK.double()},
        {"mask": MASK.bool()},
        {"size": MASK[:, :5]},
        {"size": MASK.double()},
        {"prefix": -1},
        {"prefix": 7},
        {"importance_from": "cls"},
        {"mask_gradient": "slope"},
        {"grad": Q[:1]},
        {"grad": Q.half()},
        {"grad": Q[..., :3]},
    ],
)
def test_the_operators_check_for_themselves(changes: dict[str, Any]) -> None:
    if "grad" not in changes:
        with pytest.raises(RuntimeError, match="diffrate: "):
            torch.ops.diffrate.masked_attention(**{**RAW, **changes})
    if "prefix" not in changes and "importance_from" not in changes:
        with pytest.raises(RuntimeError, match="diffrate: "):
            torch.ops.diffrate.masked_attention_backward(**{**RAW, "grad": Q, **changes})
