"""Argument checks of the operators: what came, what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: object, dims: int | Sequence[int], meaning: str) -> Tensor:
    """A floating-point tensor with one of these numbers of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {meaning}, got {type(value).__name__}")
    allowed = (dims,) if isinstance(dims, int) else dims
    if value.ndim not in allowed:
        raise ValueError(f"{name} must be {meaning}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Same device, and same dtype where asked."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} and {other_name} on {other.device}: they must be on one device")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name} is {value.dtype} and {other_name} {other.dtype}: they must have one dtype")


def check_wide_vector(name: str, value: object, features: Tensor, features_name: str, shape: tuple[int, int]) -> Tensor:
    """Importances, sizes or weights, converted to float32 (float64 beside float64 features)."""
    tensor = check_tensor(name, value, 2, "(B, N)")
    check_shape(name, tensor, shape, "(B, N)")
    check_like(name, tensor, features_name, features, dtype=False)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return tensor if tensor.dtype == wide else tensor.to(wide)  # calling .to for nothing takes a microsecond


def constant(tensor: Tensor) -> Tensor:
    """Without its gradient. A tensor that has none stays itself: detach() takes a microsecond."""
    return tensor.detach() if tensor.requires_grad else tensor


def check_int(name: str, value: object, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value  # type: ignore[return-value]


def check_prefix(prefix: object, tokens: int) -> int:
    number = check_int("prefix", prefix, 0)
    if number > tokens:
        raise ValueError(f"prefix must be at most the number of tokens, {tokens}, got {number}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_kept(k_p: object, k_m: object, prefix: int, tokens: int) -> None:
    pruned, merged = check_int("k_p", k_p), check_int("k_m", k_m)
    if pruned > tokens:
        raise ValueError(f"k_p must be at most the number of tokens, {tokens}, got {pruned}")
    if merged > pruned:
        raise ValueError(f"k_m must be at most k_p, {pruned}, got {merged}")
    least = prefix if merged == pruned else prefix + 1
    if merged < least:
        reason = "the prefix" if merged == pruned else "the prefix and one token to merge into"
        raise ValueError(f"k_m must be at least {least} ({reason}), got {merged}")
