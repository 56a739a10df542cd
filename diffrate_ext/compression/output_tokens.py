"""How many tokens a compressed model gives on, without running it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..errors import InputTypeError, InputValueError
from ..methods import MethodPlan
from ..models import adapter_for
from .patching import compressed_modules


def output_tokens(model: nn.Module, image_size: int | tuple[int, int] | None = None, *, block: int = -1) -> int:
    """Tokens of one image after a block of a compressed model, class and register tokens included.

    A language model that takes an image's tokens needs as many placeholders, less the class token where it leaves that
    out. LLaVA takes what comes out of the last block but one: ``output_tokens(tower, block=-2) - 1``.

    Args:
        model: a compressed model; of a vision-language model, its image tower.
        image_size: of the images, in pixels: (height, width), or both in one. None: the model's own.
        block: after which block, counted as a list's elements are; the last one by default.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: the model is not compressed, is in a search (ask its ``schedule()`` there) or has no such
            block, or the numbers for images of that size are not known.
    """
    compressed_modules(model)
    adapter = adapter_for(model)
    numbers: list[int] = []
    for stage in adapter.stages:
        host: Any = stage.host
        plan = host._diffrate_plan
        if not isinstance(plan, MethodPlan):
            raise InputValueError("the model is in a search, where its schedule changes: ask schedule() of the search")
        tokens = stage.tokens
        if image_size is not None:
            tokens = math.prod(adapter.grid_of(_pair(image_size))) + stage.prefix
        numbers += [left for _, left in plan.numbers_for(tokens)]
    if not -len(numbers) <= block < len(numbers):
        raise InputValueError(f"block must lie in {-len(numbers)} .. {len(numbers) - 1}, got {block}")
    return numbers[block]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise InputTypeError(f"image_size must be in pixels, such as 224 or (224, 336), got {size!r}")
    return height, width
