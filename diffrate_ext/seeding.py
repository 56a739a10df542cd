"""Random numbers that follow from a key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Within a ``with`` block, ``random``, numpy and torch draw from generators that start from ``key``.

    After it their global generators go on from where they were. Of torch that is the CPU's generator and, where it is a
    GPU, that of ``device``; other GPUs are left alone.

    Args:
        key: whole numbers >= 0.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        random.seed(int(words[0]))
        np.random.seed(words[1:3])
        torch.default_generator.manual_seed(int(words[3]))  # torch.manual_seed would seed all GPUs, too
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(int(words[3]))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
