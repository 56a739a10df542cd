"""What every test has: the devices, and how hypothesis runs."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import diffrate_ext

# no deadline and no slowness check: a shared machine may stall, and no test asserts a time
settings.register_profile("local", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
# scripts/test_emulated.sh: CUDA kernels on the emulated device are slow
settings.register_profile("emulated", settings.get_profile("ci"), max_examples=10)
if os.environ.get("DIFFRATE_EMULATED_TESTS"):
    settings.load_profile("emulated")
else:
    settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the operators run on: the CPU, and CUDA where there is a GPU and its kernels were built."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if not diffrate_ext.build_info()["cuda_architectures"]:
            pytest.skip("built without CUDA kernels")
        # convolutions, as those of patch embeddings, in full float32
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.param)
