"""What every test has: the devices, and draws that are the same in every run."""

from __future__ import annotations

import os
import random
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import diffrate_ext
from diffrate_ext.ops import _attention

# A run draws the cases of every other run; CI looks at others with --hypothesis-profile=random --hypothesis-seed=N. No
# deadline and no slowness check: a shared machine may stall, and no test asserts a time.
_common: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "max_examples": 50,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("repeatable", derandomize=True, **_common)
settings.register_profile("random", derandomize=False, print_blob=True, **_common)
# scripts/test_emulated.sh: CUDA kernels on the emulated device are slow
settings.register_profile("emulated", settings.get_profile("repeatable"), max_examples=10)
settings.load_profile("repeatable")  # where pytest is asked for another one, hypothesis loads that later
if os.environ.get("DIFFRATE_EMULATED_TESTS"):
    settings.load_profile("emulated")
    _attention.CUDA = "cpu"  # where the emulated device runs the CUDA kernels


class TorchRandom:
    """torch's random numbers for hypothesis, which starts every example from the same ones."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps no reference
hypothesis.register_random(TORCH_RANDOM)


def start_draws() -> None:
    """What is drawn from now on without a generator of its own is the same in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Every test draws the same, alone or after others."""
    start_draws()


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """So does every fixture that several tests share, whichever of them comes first."""
    if fixturedef.scope != "function":
        start_draws()


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
