"""The compiled library: what this installation was built with and runs with."""

from __future__ import annotations

import os
from typing import Any

import torch

from diffrate_ext.errors import InputValueError

_CAPABILITIES = ("plain", "avx2", "avx512")
if (_wanted := os.environ.get("DIFFRATE_CPU_CAPABILITY")) and _wanted not in _CAPABILITIES:
    # before the library is loaded: a misspelt name would quietly choose the slowest kernels
    raise InputValueError(f"DIFFRATE_CPU_CAPABILITY must be one of {', '.join(_CAPABILITIES)}, got {_wanted!r}")

try:
    import diffrate_ext._C as _C
except ImportError as error:
    raise ImportError(
        "diffrate_ext's compiled library is missing or does not load. In a checkout, install it first (`pip install .` "
        "or `pip install --no-build-isolation -e .`), and unless it was installed with -e do not import it from the "
        f"checkout's own folder. ({error})"
    ) from error


def build_info() -> dict[str, Any]:
    """What was built (compiler, instruction sets, CUDA architectures, ABI target) and what it runs with.

    Returns:
        a dict with the keys ``compiler``, ``simd_levels``, ``simd_in_use``, ``cuda_architectures`` (empty without CUDA
        kernels), ``abi_target`` (the oldest torch it runs under), ``built_with_torch``, ``torch``, ``torch_cuda`` and
        ``threads``.
    """
    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


_MOST_HEAD_CHANNELS = {float64: _C.most_head_channels(float64) for float64 in (False, True)}


def most_head_channels(*, float64: bool) -> int:
    """The most channels per head that the CUDA kernels of attention take, in float64 or in a narrower dtype.

    Not those of class_attention, which take any number.
    """
    return _MOST_HEAD_CHANNELS[float64]
