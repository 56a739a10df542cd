"""A block's first norm, computed by the block before, in one pass with the sum that it ends with."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..modes import is_traced
from .classes import unwrapped
from .fusing import fusable_norm


class NormAhead:
    """What lies between two blocks: one writes its tokens, the other takes them normalised."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self._written: ops.AddedTokens | None = None

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module) -> NormAhead | None:
        """None where the second block does not begin with a norm, and where a hook may change the tokens on the way."""
        norm = getattr(unwrapped(after), "first_norm", None)
        left = any(module._forward_hooks or "forward" in vars(module) for module in (before, unwrapped(before)))
        entered = any(module._forward_pre_hooks or "forward" in vars(module) for module in (after, unwrapped(after)))
        return None if norm is None or left or entered else cls(norm)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum, whose norm is kept until it is asked for. A compiler fuses the two by itself."""
        norm = None if is_traced() else fusable_norm(self.norm, x, branch)
        if norm is None:
            return x + branch
        self._written = ops.add_norm(x, branch, norm)
        return self._written.x

    def take(self, x: Tensor) -> Tensor:
        written, self._written = self._written, None
        return written.normalized if written is not None and written.x is x else self.norm(x)
