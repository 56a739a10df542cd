"""What the attention operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from .._build import most_head_channels
from ..errors import InputTypeError, InputValueError
from ._checks import check_like, check_prefix, check_shape, check_tensor, check_wide_vector, constant

CUDA = "cuda"
"""The type of the devices that the CUDA kernels run on. Tests without a GPU, which emulate them, set it to "cpu"."""


def check_queries(
    q: Tensor, k: Tensor, size: Tensor | None, scale: float | None, prefix: int
) -> tuple[Tensor | None, float, int]:
    """The arguments that all attention operators have: size, scale and prefix as kernels take them."""
    check_tensor("q", q, 4, "(B, H, N, D)")
    check_tensor("k", k, 4, "(B, H, N, D)")
    check_shape("k", k, q.shape, "the shape of q")
    check_like("k", k, "q", q)
    for dimension, name in ((1, "head"), (2, "token"), (3, "channel")):
        if q.shape[dimension] == 0:
            raise InputValueError(f"q must have at least one {name}, got shape {tuple(q.shape)}")
    prefix = check_prefix(prefix, q.shape[2])
    if size is not None:
        size = constant(check_wide_vector("size", size, q, "q", (q.shape[0], q.shape[2])))
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise InputTypeError(f"scale must be a number, got {type(scale).__name__}")
    return size, float(q.shape[3] ** -0.5 if scale is None else scale), prefix


def check_values(v: Tensor, q: Tensor) -> None:
    check_tensor("v", v, 4, "(B, H, N, D)")
    check_shape("v", v, q.shape, "the shape of q")
    check_like("v", v, "q", q)


def check_class_token(prefix: int) -> None:
    if prefix < 1:
        raise InputValueError(
            "prefix must be at least 1 (index 0 is the class token), got 0; without one: received_attention, or "
            "importance_from='received'"
        )


def fits_cuda_kernels(q: Tensor) -> bool:
    """Whether the CUDA kernels take heads of so many channels."""
    return q.shape[3] <= most_head_channels(float64=q.dtype == torch.float64)


def check_fits_cuda_kernels(q: Tensor) -> None:
    if q.device.type == CUDA and not fits_cuda_kernels(q):
        most = most_head_channels(float64=q.dtype == torch.float64)
        raise InputValueError(
            f"q must have at most {most} channels per head on CUDA in {q.dtype}, got shape {tuple(q.shape)}"
        )


def empty_heads(q: Tensor) -> Tensor:
    """(B, H, N, D) over (B, N, H, D) memory."""
    images, heads, tokens, channels = q.shape
    return q.new_empty(images, tokens, heads, channels).transpose(1, 2)
