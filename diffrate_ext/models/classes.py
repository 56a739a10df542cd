"""Classes of compressed modules, made at run time.

Compression changes the classes of a model, its blocks and their attention, and nothing inside them: parameters and
state_dict stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NoReturn

import torch.fx
from torch import nn

from ..errors import InputTypeError


class CompressedModule:
    """Mixin of the compressed classes of models, blocks and attention: another forward, all else as it was."""

    named: ClassVar[str] = "Compressed{}"
    """What such a class is called, after the original one."""
    _mixin: ClassVar[type[CompressedModule]]
    _original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is made at run time: pickle and deepcopy need to be told how
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_new_compressed, (self._mixin, self._original), *reduced[2:])

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks every module for what it is to read
        raise InputTypeError(_NO_SOURCE.format("torch.jit.script"))


_NO_SOURCE = "{} cannot read a compressed model: use torch.export.export, or restore() the model first"


def refuse_symbolic_trace(x: object) -> None:
    """Raise InputTypeError for what torch.fx.symbolic_trace passes in the place of a tensor."""
    if isinstance(x, torch.fx.Proxy):
        raise InputTypeError(_NO_SOURCE.format("torch.fx.symbolic_trace"))


@functools.cache
def compressed_class(mixin: type[CompressedModule], original: type[nn.Module]) -> type[nn.Module]:
    """``original`` with the forward of ``mixin``."""
    members = {"__module__": mixin.__module__, "__doc__": mixin.__doc__, "_mixin": mixin, "_original": original}
    return type(mixin.named.format(original.__name__), (mixin, original), members)


def _new_compressed(mixin: type[CompressedModule], original: type[nn.Module]) -> nn.Module:
    cls = compressed_class(mixin, original)  # type: ignore[arg-type]
    return cls.__new__(cls)


def original_class(module: Any) -> type[Any]:
    """The module's class before compression."""
    return module._original if isinstance(module, CompressedModule) else type(module)


def unwrapped(module: Any) -> Any:
    """The module inside torch's wrappers for activation checkpointing and compilation."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        inner = getattr(module, name, None)
        if inner is not None:
            return unwrapped(inner)
    return module


def has_forward_of(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether the module computes what one of the classes computes, rather than an override of its own."""
    return any(original_class(module).forward is cls.forward for cls in classes)
