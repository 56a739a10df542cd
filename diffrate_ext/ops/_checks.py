"""Argument checks that operators share: what came, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputTypeError, InputValueError
from ..modes import in_transform
from ..numeric import wide_dtype

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: object, dims: int | Sequence[int], meaning: str) -> Tensor:
    """A floating-point tensor with one of these numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise InputTypeError(f"{name} must be a tensor {meaning}, got {type(value).__name__}")
    allowed = (dims,) if isinstance(dims, int) else dims
    if value.ndim not in allowed:
        raise InputValueError(f"{name} must be {meaning}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOAT_TYPES:
        raise InputTypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if value.shape != shape:
        raise InputValueError(f"{name} must be {meaning} = {tuple(shape)}, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Same device, and same dtype where asked."""
    if value.device != other.device:
        raise InputValueError(
            f"{name} is on {value.device} and {other_name} on {other.device}: they must be on one device"
        )
    if dtype and value.dtype != other.dtype:
        raise InputTypeError(f"{name} is {value.dtype} and {other_name} {other.dtype}: they must have one dtype")


def check_wide_vector(name: str, value: object, features: Tensor, features_name: str, shape: tuple[int, int]) -> Tensor:
    """Importances, sizes or weights, converted to float32 (float64 beside float64 features)."""
    tensor = check_tensor(name, value, 2, "(B, N)")
    check_shape(name, tensor, shape, "(B, N)")
    check_like(name, tensor, features_name, features, dtype=False)
    wide = wide_dtype(features)
    return tensor if tensor.dtype == wide else tensor.to(wide)  # calling .to for nothing takes a microsecond


def check_residual(residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and what is added to them, both (B, N, C), in the dtype of their sum: under autocast the two differ."""
    check_tensor("residual", residual, 3, "(B, N, C)")
    check_shape("residual", residual, x.shape, "the shape of x")
    check_like("residual", residual, "x", x, dtype=False)
    if residual.dtype == x.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def constant(tensor: Tensor) -> Tensor:
    """Without its gradient. A tensor that has none stays itself: detach() takes a microsecond.

    In a transform each is detached: there a tensor's ``requires_grad`` does not tell.
    """
    wants_gradient = tensor.requires_grad or (torch.is_grad_enabled() and in_transform())
    return tensor.detach() if wants_gradient else tensor


def check_int(name: str, value: object, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise InputTypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise InputValueError(f"{name} must be at least {least}, got {value}")
    return value  # type: ignore[return-value]


def check_eps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise InputValueError(f"{name} must be finite and at least 0, got {value}")


def check_prefix(prefix: object, tokens: int) -> int:
    number = check_int("prefix", prefix, 0)
    if number > tokens:
        raise InputValueError(f"prefix must be at most the number of tokens, {tokens}, got {number}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise InputValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_importance(name: str, importance: Tensor, x: Tensor, prefix: int) -> Tensor:
    """Importance (B, N-P) or (B, N) of tokens x (B, N, C)."""
    check_tensor(name, importance, 2, "(B, N-P) or (B, N)")
    images, tokens = x.shape[:2]
    if tuple(importance.shape) not in ((images, tokens - prefix), (images, tokens)):
        raise InputValueError(
            f"{name} must be (B, N-P) = {(images, tokens - prefix)} or (B, N) = {(images, tokens)}, "
            f"got shape {tuple(importance.shape)}"
        )
    check_like(name, importance, "x", x, dtype=False)
    return constant(importance)


def check_slot(name: str, slot: object) -> None:
    """Positions (B, N)."""
    if not isinstance(slot, Tensor):
        raise InputTypeError(f"{name} must be a tensor (B, N), got {type(slot).__name__}")
    if slot.dtype != torch.int64:
        raise InputTypeError(f"{name} must be int64, got {slot.dtype}")
    if slot.ndim != 2:
        raise InputValueError(f"{name} must be (B, N), got shape {tuple(slot.shape)}")


def check_range(name: str, positions: Tensor, count: int) -> None:
    """Positions must lie in -1 .. count-1.

    Looked at on the CPU only, elsewhere looking would stop the stream; and not in transforms such as vmap, which have
    no numbers to look at.
    """
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or in_transform() or positions.numel() == 0:
        return
    low, high = (int(end) for end in positions.aminmax())
    if low < -1 or high >= count:
        raise InputValueError(f"{name} must lie in -1 .. {count - 1}, got values from {low} to {high}")
