"""Whether an operator may compute what a module would."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from timm.models.metaformer import LayerNormNoBias
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..ops import Norm


def fusable_norm(norm: nn.Module, *inputs: Tensor) -> Norm | None:
    """The module as an operator's argument, where calling it with the sum of the inputs does that and nothing else.

    None where a hook or another forward would be left out, where a gradient is needed, where autocast makes the result
    float32, and where weights and inputs are not of one dtype.
    """
    if type(norm) not in (nn.LayerNorm, LayerNorm, LayerNormNoBias) or "forward" in vars(norm):
        return None
    assert isinstance(norm, nn.LayerNorm)
    weight, bias = norm.weight, norm.bias
    tensors = [weight, *inputs] if bias is None else [weight, bias, *inputs]
    if (
        weight is None
        or getattr(norm, "_fast_norm", False)
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or nn_module._has_any_global_hook()
        or norm.normalized_shape != inputs[0].shape[-1:]
        or any(tensor.dtype != weight.dtype or tensor.device != weight.device for tensor in tensors)
        or weight.is_meta
        or torch.is_autocast_enabled(weight.device.type)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        return None
    return Norm(weight, bias, norm.eps)
