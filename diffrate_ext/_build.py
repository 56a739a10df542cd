"""What this installation was built with and runs with."""

from __future__ import annotations

from typing import Any

import torch

try:
    from diffrate_ext import _C
except ImportError as error:
    raise ImportError(
        "diffrate_ext's compiled library is missing or does not load. In a checkout, install it first (`pip install .`, or "
        "`pip install --no-build-isolation -e .`) and do not import it from the checkout's own folder unless it was "
        f"installed with -e. ({error})"
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
