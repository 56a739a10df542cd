"""What the attention operators have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager, assert_same
from strategies import AttentionCase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffrate_ext import InputTypeError, InputValueError
from diffrate_ext.reference import class_attention, proportional_attention

TINY = torch.finfo(torch.float32).tiny
Operator = Callable[..., Tensor]


def class_rows(q: Tensor, k: Tensor, size: Tensor | None, **options: Any) -> Tensor:
    rows = proportional_attention(q, k, k, size, importance_from="class_rows", **options)[1]
    assert rows is not None
    return rows


def check_accuracy(operator: Operator, reference: Operator, case: AttentionCase, device: torch.device) -> None:
    q, k, _ = case.qkv(device)
    check_importance(operator(q, k, case.size(device), scale=case.scale, prefix=case.prefix), reference, case)


def check_importance(importance: Tensor, reference: Operator, case: AttentionCase) -> None:
    """What an operator measured in this case."""

    def compute(q: Tensor, k: Tensor, size: Tensor | None) -> Tensor:
        return reference(q, k, size, scale=case.scale, prefix=case.prefix)

    assert importance.is_contiguous()
    assert not importance.requires_grad
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    terms = rounded_terms(case, reference)
    inputs = [*case.qkv()[:2], case.size()]
    assert_as_accurate_as_eager("importance", importance, compute, inputs, dtype=dtype, terms=terms)


def rounded_terms(case: AttentionCase, reference: Operator) -> Tensor:
    """What the roundings of logits do to importance, as a magnitude: p = exp(l - top) moves by p (|dl| + |d top|)."""
    q, k, _ = (tensor.double() for tensor in case.qkv())
    size = case.size()
    logits = q @ k.transpose(-1, -2) * case.logit_scale
    if size is not None:
        logits = logits + size.double().clamp_min(TINY).log()[:, None, None]
    terms = logits.softmax(-1) * (1 + logits.abs() + logits.amax(-1, keepdim=True).abs())
    if reference is class_rows:
        return terms[:, :, 0]
    per_head = terms[:, :, 0] if reference is class_attention else terms.mean(2)
    return per_head.mean(1)[:, case.prefix :]


def check_sizes(operator: Operator, device: torch.device) -> None:
    """No size is size one; a size of which no logarithm can be taken counts as the smallest normal float32."""
    q, k = torch.randn(2, 2, 3, 17, 8, device=device)
    ones = torch.ones(2, 17, device=device)
    assert_same("without size", operator(q, k), operator(q, k, ones))
    assert_same("half-precision sizes", operator(q, k, ones.half() * 3), operator(q, k, ones * 3))
    for small in (0.0, -0.0, -1.0, -torch.inf, TINY / 2):
        sizes, clamped = ones.clone(), ones.clone()
        sizes[:, 5], clamped[:, 5] = small, TINY
        out = operator(q, k, sizes)
        assert_same(f"size {small}", out, operator(q, k, clamped))
        assert out.isfinite().all()
    doubled = ones.clone()
    doubled[:, 6] = 2
    assert (operator(q, k, doubled, prefix=1)[:, 5] > operator(q, k, ones, prefix=1)[:, 5]).all()


def check_large_logits(operator: Operator, device: torch.device) -> None:
    """Logits of some thousands: the softmax is nearly one-hot, and no exponential overflows."""
    q, k = torch.randn(2, 2, 3, 33, 16, device=device)
    for scale in (1e3, -1e3, 1e30):
        out = operator(q, k, scale=scale, prefix=1)
        assert out.isfinite().all()
        assert (out >= 0).all()
        assert (out.sum(1) <= 1 + 33 * torch.finfo(torch.float32).eps).all()


def check_nan_stays_in_its_image(operator: Operator, device: torch.device) -> None:
    q, k = torch.randn(2, 3, 2, 17, 8, device=device)
    clean = operator(q, k)
    q[1, :, 0, 3] = torch.nan
    out = operator(q, k)
    assert_same("other images", out[[0, 2]], clean[[0, 2]])
    assert out[1].isnan().all()


def check_no_images(operator: Operator, device: torch.device) -> None:
    q = torch.zeros(0, 2, 5, 4, device=device)
    assert operator(q, q, torch.ones(0, 5, device=device), prefix=1).shape == (0, 4)


Q = torch.zeros(2, 3, 6, 4)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": None}, InputTypeError, "q must be a tensor (B, H, N, D), got NoneType"),
    ({"q": Q[0]}, InputValueError, "q must be (B, H, N, D), got shape (3, 6, 4)"),
    ({"q": Q.int(), "k": Q.int()}, InputTypeError, "q must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"k": 0}, InputTypeError, "k must be a tensor (B, H, N, D), got int"),
    ({"k": Q[:, :, :5]}, InputValueError, "k must be the shape of q = (2, 3, 6, 4), got shape (2, 3, 5, 4)"),
    ({"k": Q[0]}, InputValueError, "k must be (B, H, N, D), got shape (3, 6, 4)"),
    ({"k": Q.half()}, InputTypeError, "k is torch.float16 and q torch.float32: they must have one dtype"),
    ({"k": Q.to("meta")}, InputValueError, "k is on meta and q on cpu: they must be on one device"),
    ({"q": Q[:, :0], "k": Q[:, :0]}, InputValueError, "q must have at least one head, got shape (2, 0, 6, 4)"),
    ({"q": Q[:, :, :0], "k": Q[:, :, :0]}, InputValueError, "q must have at least one token, got shape (2, 3, 0, 4)"),
    ({"q": Q[..., :0], "k": Q[..., :0]}, InputValueError, "q must have at least one channel, got shape (2, 3, 6, 0)"),
    ({"size": [1.0]}, InputTypeError, "size must be a tensor (B, N), got list"),
    ({"size": torch.ones(2, 5)}, InputValueError, "size must be (B, N) = (2, 6), got shape (2, 5)"),
    ({"size": torch.ones(6)}, InputValueError, "size must be (B, N), got shape (6,)"),
    ({"size": torch.ones(2, 6).int()}, InputTypeError, "size must be float32"),
    ({"size": torch.ones(2, 6, device="meta")}, InputValueError, "size is on meta and q on cpu"),
    ({"scale": "1"}, InputTypeError, "scale must be a number, got str"),
    ({"scale": torch.ones(())}, InputTypeError, "scale must be a number, got Tensor"),
    ({"prefix": 7}, InputValueError, "prefix must be at most the number of tokens, 6, got 7"),
    ({"prefix": -1}, InputValueError, "prefix must be at least 0, got -1"),
    ({"prefix": 1.5}, InputTypeError, "prefix must be an int, got float"),
]

RAW_ERRORS: list[tuple] = [
    (Q[0], Q[0], None, 1.0),
    (Q, Q[:, :, :5], None, 1.0),
    (Q, Q[:1], None, 1.0),
    (Q, Q[:, :1], None, 1.0),
    (Q, Q[..., :3], None, 1.0),
    (Q, Q.half(), None, 1.0),
    (Q.long(), Q.long(), None, 1.0),
    (Q[:, :0], Q[:, :0], None, 1.0),
    (Q[:, :, :0], Q[:, :, :0], None, 1.0, 0),
    (Q, Q, torch.ones(2, 5), 1.0),
    (Q, Q, torch.ones(1, 6), 1.0),
    (Q, Q, torch.ones(2, 6).double(), 1.0),
    (Q, Q, None, 1.0, -1),
    (Q, Q, None, 1.0, 7),
]


def check_raw_error(operator: Operator, arguments: tuple) -> None:
    with pytest.raises(RuntimeError, match="diffrate: "):
        operator(*arguments)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned, and which operator."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                self.elements, self.operator = tensor.numel(), str(func)
        return result
