"""FLOPs (multiply-accumulates) of plain and compressed models."""

from __future__ import annotations

from torch import nn

from ..models import adapter_for
from ..schedule import Schedule


def flops(model: nn.Module, schedule: Schedule | None = None) -> int:
    """Multiply-accumulates of one image of the model's own input size, as DeiT, ToMe and DiffRate count them.

    Only matrix products and convolutions count. The convention of the paper is kept where it is coarse: the patch
    embedding is counted for the prefix tokens too, and CAFormer's head as ``8 * C * classes``.

    Args:
        model: an image model of timm; on ``torch.device("meta")`` it costs no memory.
        schedule: None counts the uncompressed model, whether or not ``model`` is compressed at the moment.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: a part of the model is not supported, or the schedule does not fit it.
    """
    adapter = adapter_for(model)
    if schedule is None:
        kept = [[stage.tokens] * len(stage.blocks) for stage in adapter.stages]
    else:
        kept = [[merged for _, merged in numbers] for numbers in adapter.kept_numbers(schedule)]
    return adapter.cost.total(kept)
