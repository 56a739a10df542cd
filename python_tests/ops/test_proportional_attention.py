"""proportional_attention: accuracy, gradients, memory layout, and that no attention map is ever built."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import attention_checks
import pytest
import torch
import torch.nn.functional as F
from attention_checks import LargestTensor
from compare import assert_as_accurate_as_eager, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import AttentionCase, attention_cases
from torch import Tensor

from diffrate_ext import InputTypeError, InputValueError, ops, reference
from diffrate_ext.ops import _attention
from diffrate_ext.ops.proportional_attention import has_kernel

TINY = torch.finfo(torch.float32).tiny


def attention_map(case: AttentionCase, q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-1, -2) * case.logit_scale
    return logits.softmax(-1) if size is None else (logits + log_size(size, q)).softmax(-1)


def log_size(size: Tensor, q: Tensor) -> Tensor:
    return size.clamp_min(TINY).log()[:, None, None].to(q.dtype)


def attention(case: AttentionCase) -> Any:
    """In float64 by the formula; in other dtypes by torch's fused attention, whose exponential is rough."""

    def compute(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
        if q.dtype == torch.float64:
            return attention_map(case, q, k, size) @ v
        bias = None if size is None else log_size(size, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=case.logit_scale)

    return compute


def added_terms(case: AttentionCase) -> Tensor:
    """Magnitudes of what is added up: where values cancel, sums round more than their result tells."""
    q, k, v = (tensor.double() for tensor in case.qkv())
    size = case.size()
    return attention_map(case, q, k, None if size is None else size.double()) @ v.abs()


def gradient_terms(case: AttentionCase, inputs: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of all that is added up and taken off in the gradients of q, k and v."""
    q, k, v, size, gradient = (None if tensor is None else tensor.double() for tensor in inputs)
    assert q is not None
    assert k is not None
    assert v is not None
    assert gradient is not None
    attn = attention_map(case, q, k, size)
    exponents = (q @ k.transpose(-1, -2) * case.logit_scale).abs()  # a weight moves by as much as its logit is rounded
    rounded = attn * (1 + exponents + exponents.amax(-1, keepdim=True))
    q, k, v, gradient = q.abs(), k.abs(), v.abs(), gradient.abs()
    delta = (gradient * (attn @ v)).sum(-1, keepdim=True)
    logits = attn * (gradient @ v.transpose(-1, -2) + delta) * abs(case.logit_scale)
    return logits @ k, logits.transpose(-1, -2) @ q, rounded.transpose(-1, -2) @ gradient


@given(case=attention_cases(least_prefix=1))
def test_accuracy(device: torch.device, case: AttentionCase) -> None:
    q, k, v = case.qkv()
    size = case.size()
    options: dict[str, Any] = {"scale": case.scale, "prefix": case.prefix}
    results = [
        ops.proportional_attention(*case.qkv(device), case.size(device), **options, importance_from=importance_from)
        for importance_from in ("class", "received", None)
    ]
    assert results[2][1] is None
    assert_same("out, with the class token's attention or without", results[0][0], results[2][0])
    for out, _ in results[:2]:  # on CUDA attention received may have another kernel
        assert_as_accurate_as_eager(
            "out", out, attention(case), [q, k, v, size], dtype=case.dtype, terms=added_terms(case)
        )


REFERENCES = {
    "class": reference.class_attention,
    "class_rows": attention_checks.class_rows,
    "received": reference.received_attention,
}


@pytest.mark.parametrize("importance_from", REFERENCES)
@given(case=attention_cases(least_prefix=1))
def test_importance(device: torch.device, importance_from: Any, case: AttentionCase) -> None:
    def measure(q: Tensor, k: Tensor, size: Tensor | None, **options: Any) -> Tensor:
        measured = ops.proportional_attention(q, k, k, size, importance_from=importance_from, **options)[1]
        assert measured is not None
        return measured

    attention_checks.check_accuracy(measure, REFERENCES[importance_from], case, device)


@given(case=attention_cases(least_prefix=1))
def test_class_rows(device: torch.device, case: AttentionCase) -> None:
    """Beside the same out they have the importance as their mean; where one kernel gives both, bit by bit."""
    q, k, v = case.qkv(device)
    size = case.size(device)
    options: dict[str, Any] = {"scale": case.scale, "prefix": case.prefix}
    out, rows = ops.proportional_attention(q, k, v, size, importance_from="class_rows", **options)
    expected, importance = ops.proportional_attention(q, k, v, size, **options)
    assert rows is not None
    assert importance is not None
    assert_same("out", out, expected)
    # on the CPU: on a GPU torch multiplies by 1 / heads
    mean = (sum(rows.unbind(1), torch.zeros_like(rows[:, 0])).cpu() / case.heads)[:, case.prefix :]
    if not has_kernel(q, k, v):
        torch.testing.assert_close(mean, importance.cpu(), atol=1e-5, rtol=1e-4)
        return
    assert_same("mean", mean, importance)
    x = torch.randn(case.images, case.tokens, 8, device=device)
    kept = (case.tokens, case.tokens)
    by_rows, by_mean = (ops.prune_merge(x, attn, *kept, prefix=case.prefix).slot for attn in (rows, importance))
    assert_same("order", by_rows, by_mean)


# --- the operator itself, where there is a kernel; half precision reaches it through ops, too


def kernel_or_skip(device: torch.device) -> Any:
    if device.type != _attention.CUDA:
        pytest.skip("torch's fused attention serves there")
    return torch.ops.diffrate.proportional_attention


@given(case=attention_cases(), importance_from=st.sampled_from([*REFERENCES, "none"]))
def test_kernel_accuracy(device: torch.device, case: AttentionCase, importance_from: str) -> None:
    operator = kernel_or_skip(device)
    q, k, v = case.qkv()
    size = case.size()
    out, measured = operator(*case.qkv(device), case.size(device), case.logit_scale, case.prefix, importance_from)
    if importance_from == "none":
        assert measured.shape == (case.images, 0)
    else:
        attention_checks.check_importance(measured, REFERENCES[importance_from], case)
    terms = logit_terms(case, q, k, size) @ v.double().abs()
    terms = out.double().cpu().abs() + terms * (
        torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps / torch.finfo(case.dtype).eps
    )
    assert_as_accurate_as_eager("out", out, attention(case), [q, k, v, size], dtype=case.dtype, terms=terms)
    assert out.transpose(1, 2).is_contiguous()


def logit_terms(case: AttentionCase, q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
    """What the roundings of logits move the attention map by, as a magnitude."""
    q, k = q.double(), k.double()
    uncertain = 1 + q.abs() @ k.abs().transpose(-1, -2) * abs(case.logit_scale)
    if size is not None:
        uncertain = uncertain + log_size(size.double(), q).abs()
    attn = attention_map(case, q, k, None if size is None else size.double())
    return attn * (uncertain + uncertain.amax(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("importance_from", [*REFERENCES, None])
def test_half_precision_uses_the_kernel(
    device: torch.device, dtype: torch.dtype, importance_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_or_skip(device)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    q, k, v = AttentionCase(2, 3, 17, 128, 1, dtype).qkv(device)
    ops.proportional_attention(q, k, v, importance_from=importance_from)
    wide = [torch.cat([tensor, tensor], -1) for tensor in (q, k, v)]
    for left_to_torch in ([q.clone().requires_grad_(), k, v], [q.float(), k.float(), v.float()], wide):
        with pytest.raises(TypeError, match="NoneType"):
            ops.proportional_attention(*left_to_torch, importance_from=importance_from)


def test_the_kernel_refuses_a_gradient(device: torch.device) -> None:
    """It has none: zeros would go unnoticed."""
    operator = kernel_or_skip(device)
    q = torch.randn(1, 2, 5, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        operator(q, q, q, None, 1.0)[0].sum().backward()


@pytest.mark.parametrize("importance_from", REFERENCES)
def test_kernel_with_special_values(device: torch.device, importance_from: str) -> None:
    operator = kernel_or_skip(device)
    q, k, v = AttentionCase(3, 2, 65, 16, 1, torch.float32).qkv(device)
    clean, clean_importance = operator(q, k, v, None, 0.25, 1, importance_from)
    for scale in (1e3, -1e3, 1e30):
        out, measured = operator(q, k, v, None, scale, 1, importance_from)
        assert out.isfinite().all()
        assert ((measured >= 0) & (measured <= 1 + 1e-5)).all()
    q[1, :, 0, 3] = torch.nan
    out, measured = operator(q, k, v, None, 0.25, 1, importance_from)
    assert out[1, :, 0].isnan().all()
    assert measured[1].isnan().all()
    assert_same("other tokens", out[1, :, 1:], clean[1, :, 1:])
    assert_same("other images", out[[0, 2]], clean[[0, 2]])
    assert_same("importance of other images", measured[[0, 2]], clean_importance[[0, 2]])
    sizes = torch.ones(3, 65, device=device)
    for small in (0.0, -1.0, -torch.inf, TINY / 2):
        sizes[:, 5] = small
        actual = operator(q, k, v, sizes, 0.25, 1, importance_from)
        sizes[:, 5] = TINY
        for a, b in zip(actual, operator(q, k, v, sizes, 0.25, 1, importance_from), strict=True):
            assert_same(f"size {small}", a, b)


def test_kernel_refuses_wide_heads(device: torch.device) -> None:
    operator = kernel_or_skip(device)
    q = torch.zeros(1, 1, 3, 129, device=device)
    with pytest.raises(RuntimeError, match="heads of at most 128 channels"):
        operator(q, q, q, None, 1.0)
    with pytest.raises(InputValueError, match=r"at most 128 channels per head on CUDA in torch\.float32"):
        ops.received_attention(q, q)
    q = q[..., :65].double()
    with pytest.raises(InputValueError, match=r"at most 64 channels per head on CUDA in torch\.float64"):
        ops.masked_attention(q, q, q, torch.ones(1, 3, device=device))


RAW: dict[str, Any] = {"q": attention_checks.Q, "k": attention_checks.Q, "v": attention_checks.Q, "size": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"q": RAW["q"][0]},
        {"k": RAW["q"][:, :, :5]},
        {"v": RAW["q"][..., :3]},
        {"v": RAW["q"].half()},
        {"q": RAW["q"][..., :0], "k": RAW["q"][..., :0], "v": RAW["q"][..., :0]},
        {"size": torch.ones(2, 5)},
        {"size": torch.ones(2, 6).double()},
        {"prefix": -1},
        {"prefix": 7},
        {"importance_from": "cls"},
    ],
)
def test_the_operator_checks_for_itself(device: torch.device, changes: dict[str, Any]) -> None:
    operator = kernel_or_skip(device)
    arguments = {**RAW, "scale": 1.0, **changes}
    on_device = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with pytest.raises(RuntimeError, match="diffrate: "):
        operator(**on_device)


# --- the reference, gradients, layout


@settings(max_examples=20)
@given(case=attention_cases(least_prefix=1))
def test_the_reference_agrees(case: AttentionCase) -> None:
    """Half precision is not rounded between steps there."""
    q, k, v = case.qkv()
    size = case.size()
    out, _ = reference.proportional_attention(q, k, v, size, scale=case.scale, prefix=case.prefix)
    assert_as_accurate_as_eager("out", out, attention(case), [q, k, v, size], dtype=case.dtype, terms=added_terms(case))


@pytest.mark.parametrize("layout", ["contiguous", "packed qkv", "tokens before heads"])
@pytest.mark.parametrize("sizes", [None, "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_ready_for_the_projection(
    device: torch.device, layout: str, sizes: str | None, dtype: torch.dtype
) -> None:
    case = AttentionCase(2, 3, 65, 16, 1, dtype, layout, sizes)
    out, _ = ops.proportional_attention(*case.qkv(device), case.size(device))
    assert out.transpose(1, 2).is_contiguous()


@settings(max_examples=20)
@given(case=attention_cases(least_prefix=1))
def test_gradients(device: torch.device, case: AttentionCase) -> None:
    if case.layout == "expanded batch":  # leaves have memory of their own
        case = replace(case, layout="packed qkv")
    q, k, v = case.qkv()
    leaves = [tensor.requires_grad_() for tensor in case.qkv(device)]
    assert [leaf.stride() for leaf in leaves] == [tensor.stride() for tensor in (q, k, v)]
    out, importance = ops.proportional_attention(*leaves, case.size(device), scale=case.scale, prefix=case.prefix)
    assert importance is not None
    assert not importance.requires_grad
    out.backward(case.gradient(device))
    inputs = [q, k, v, case.size(), case.gradient()]
    terms = gradient_terms(case, inputs)
    for index, name in enumerate("qkv"):

        def compute(
            q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, gradient: Tensor, index: int = index
        ) -> Tensor:
            leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
            return torch.autograd.grad(attention(case)(*leaves, size), leaves[index], gradient)[0]

        grad = leaves[index].grad
        assert grad is not None
        assert_as_accurate_as_eager(f"gradient of {name}", grad, compute, inputs, dtype=case.dtype, terms=terms[index])


def test_gradcheck(device: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64, device=device)
    size = 1 + torch.rand(1, 4, dtype=torch.float64, device=device)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.proportional_attention(q, k, v, size)[0]

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in (q, k, v)])


def test_a_size_counts_as_so_many_tokens(device: torch.device) -> None:
    """The paper's promise: attention to a token of size 3 is attention to that token three times."""
    q, k, v = torch.randn(3, 2, 2, 6, 8, device=device)
    size = torch.ones(2, 6, device=device)
    size[:, 4] = 3
    out, importance = ops.proportional_attention(q, k, v, size)
    assert importance is not None
    index = torch.tensor([0, 1, 2, 3, 4, 4, 4, 5], device=device)
    attn = (q @ k[:, :, index].transpose(-1, -2) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(out, attn @ v[:, :, index])
    torch.testing.assert_close(importance[:, 3], attn[:, :, 0, 4:7].sum(-1).mean(1))


TOKENS = 601  # large beside what is legitimately there: H * N * D elements are a tenth of N * N


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [None, "random"])
@pytest.mark.parametrize("importance_from", [*REFERENCES, None])
def test_no_attention_map_is_built(train: bool, dtype: torch.dtype, sizes: str | None, importance_from: Any) -> None:
    case = AttentionCase(1, 2, TOKENS, 16, 1, dtype, "packed qkv", sizes)
    q, k, v = (tensor.requires_grad_(train) for tensor in case.qkv())
    size = case.size()
    with LargestTensor() as largest:
        out, _ = ops.proportional_attention(q, k, v, size, importance_from=importance_from)
        if train:
            out.sum().backward()
    assert 0 < largest.elements < TOKENS * TOKENS / 2, f"{largest.operator} returned {largest.elements} elements"


def test_the_recorder_sees_an_attention_map() -> None:
    q, k, v = AttentionCase(1, 2, TOKENS, 16, 1, torch.float32).qkv()
    with LargestTensor() as largest:
        reference.proportional_attention(q, k, v)
    assert largest.elements == 2 * TOKENS * TOKENS


def test_no_images(device: torch.device) -> None:
    q = torch.zeros(0, 2, 5, 4, device=device)
    out, importance = ops.proportional_attention(q, q, q, torch.ones(0, 5, device=device))
    assert importance is not None
    assert out.shape == (0, 2, 5, 4)
    assert importance.shape == (0, 4)


Q = attention_checks.Q


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *attention_checks.ERRORS,
        ({"v": None}, InputTypeError, "v must be a tensor (B, H, N, D), got NoneType"),
        ({"v": Q[0]}, InputValueError, "v must be (B, H, N, D), got shape (3, 6, 4)"),
        ({"v": Q[..., :3]}, InputValueError, "v must be the shape of q = (2, 3, 6, 4), got shape (2, 3, 6, 3)"),
        ({"v": Q.half()}, InputTypeError, "v is torch.float16 and q torch.float32"),
        ({"v": Q.to("meta")}, InputValueError, "v is on meta and q on cpu"),
        (
            {"importance_from": "cls"},
            InputValueError,
            "importance_from must be one of 'class', 'class_rows', 'received', None, got 'cls'",
        ),
        ({"prefix": 0}, InputValueError, "prefix must be at least 1 (index 0 is the class token), got 0"),
        (
            {"prefix": 0, "importance_from": "class_rows"},
            InputValueError,
            "prefix must be at least 1 (index 0 is the class token), got 0",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.proportional_attention(**{"q": Q, "k": Q, "v": Q, **changes})
