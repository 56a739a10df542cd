"""Faster Vision Transformers by DiffRate token compression (Chen et al., ICCV 2023).

``diffrate_ext.ops`` holds the operators, ``diffrate_ext.reference`` the same in plain PyTorch. ``compress`` and
``restore`` apply a ``Schedule`` of kept tokens to a timm model.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING
from typing import Any as _Any

import torch as _torch  # noqa: F401  first: it loads the libraries that diffrate_ext._C links to

from ._torchvision import make_importable as _make_torchvision_importable

_make_torchvision_importable()

from . import ops, reference  # noqa: E402
from ._build import build_info  # noqa: E402

if TYPE_CHECKING:
    from .compression import compress, restore, token_slots
    from .evaluation import evaluate
    from .rates import RateSearch
    from .schedule import Schedule
    from .searching import SearchSettings, search
    from .timing import benchmark
    from .visualization import visualize

__version__ = _version("diffrate_ext")

__all__ = [
    "RateSearch",
    "Schedule",
    "SearchSettings",
    "benchmark",
    "build_info",
    "compress",
    "evaluate",
    "ops",
    "reference",
    "restore",
    "search",
    "token_slots",
    "visualize",
]

# Loaded when first used: they import timm and matplotlib, and the operators need neither.
_LAZY = {
    "RateSearch": "rates",
    "Schedule": "schedule",
    "SearchSettings": "searching",
    "benchmark": "timing",
    "compress": "compression",
    "evaluate": "evaluation",
    "restore": "compression",
    "search": "searching",
    "token_slots": "compression",
    "visualize": "visualization",
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
