"""What the operators' gradients share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_gradient(name: str, message: str) -> None:
    """Where a formula is missing, a gradient raises, instead of being zero."""

    def refuse(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(message)

    torch.library.register_autograd(f"diffrate::{name}", refuse, setup_context=lambda ctx, inputs, output: None)
