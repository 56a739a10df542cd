"""Faster Vision Transformers by DiffRate token compression (Chen et al., ICCV 2023).

``diffrate_ext.ops`` holds the operators; ``compress`` and ``restore`` apply a ``Schedule`` of kept tokens to a timm model.
"""

from __future__ import annotations

from importlib.metadata import version as _version

import torch as _torch  # first: it loads the libraries that diffrate_ext._C links to

from diffrate_ext._torchvision import make_importable as _make_torchvision_importable

_make_torchvision_importable()

from diffrate_ext import ops, reference  # noqa: E402
from diffrate_ext._build import build_info  # noqa: E402

__version__ = _version("diffrate_ext")

__all__ = ["build_info", "ops", "reference"]
