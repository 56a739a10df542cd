"""What a training loop asks of the batches that a loader gives, and what tells one model from another."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputValueError
from ..evaluation import Batch, check_labels
from ..models import adapter_for
from ..seeding import seeded
from .files import Fact

Loader: TypeAlias = "Iterable[Batch] | Callable[[int], Iterable[Batch]]"
"""Batches, iterated again and again; or a function that takes a step and returns the batches from that step on."""


def step_batches(loader: Loader, start: int, steps: int, *, seed: int, rank: int) -> Iterator[Batch]:
    """The batches of the steps ``start`` .. ``steps - 1``.

    Raises:
        InputValueError: the loader gives none.
    """
    first = start if callable(loader) else 0
    batches = _endless(loader, first)
    for step in range(first, steps):
        # the same random numbers whether or not the run was resumed: a shuffling loader draws its order from them
        with seeded(seed, step, rank):
            batch = next(batches)
        if step >= start:  # only iterating brings a plain loader to where the run stopped
            yield batch


def _endless(loader: Loader, start: int) -> Iterator[Batch]:
    step = start
    while True:
        begun = step
        for batch in loader(step) if callable(loader) else loader:
            yield batch
            step += 1
        if step == begun:
            again = "" if step == start else f", iterated again after {step - start} batches: it must give them again"
            raise InputValueError(f"the loader gave no images{again}")


def fitting_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels or probabilities that fit logits of this shape, on their device."""
    if not labels.is_floating_point():
        check_labels(labels, logits)
        return labels.to(logits.device, torch.int64)
    if labels.shape != logits.shape:
        expected = f"{tuple(logits.shape)}, as the logits have"
        raise InputValueError(f"probabilities as labels must have shape {expected}, got {tuple(labels.shape)}")
    return labels.to(logits.device, logits.dtype)


def model_fingerprint(model: nn.Module) -> dict[str, Fact]:
    """What tells this model, with these weights, from others."""
    checksum = 0
    for parameter in model.parameters():  # the first numbers of each tell trained weights apart
        numbers = parameter.detach().flatten()[:16].float().cpu().numpy()
        checksum = zlib.crc32(numbers.tobytes(), checksum)
    adapter = adapter_for(model)
    return {
        "model": adapter.name,
        "tokens": adapter.stages[0].tokens,
        "blocks": sum(len(stage.blocks) for stage in adapter.stages),
        "weights": f"{checksum:08x}",
    }
