"""A block's first norm, computed by the block before, in one pass with the sum that it ends with."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..modes import is_traced
from .classes import CompressedModule
from .fusing import fusable_norm


class NormAhead:
    """What lies between two blocks: one writes its tokens, the other takes them normalised."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self._written: ops.AddedTokens | None = None

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module) -> NormAhead | None:
        """None where it is of no use or would show.

        That is where the second block does not begin with a norm, where something else may see or change the tokens on
        the way, and under a compiler, which fuses the two by itself.
        """
        if is_traced() or not (_is_called_as_it_is(before) and _is_called_as_it_is(after)):
            return None
        norm = getattr(after, "first_norm", None)
        return None if norm is None or before._forward_hooks or after._forward_pre_hooks else cls(norm)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum, whose norm is kept until it is asked for."""
        norm = fusable_norm(self.norm, x, branch)
        if norm is None:
            return x + branch
        self._written = ops.add_norm(x, branch, norm)
        return self._written.x

    def take(self, x: Tensor) -> Tensor:
        written, self._written = self._written, None
        return written.normalized if written is not None and written.x is x else self.norm(x)


def _is_called_as_it_is(block: nn.Module) -> bool:
    """No wrapper's forward, which may bring the weights first, no compiled one, and none of the instance's own."""
    return isinstance(block, CompressedModule) and block._compiled_call_impl is None and "forward" not in vars(block)
