"""Compressed forms of a model on images that nothing was learned from, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .answers import has_classes
from .evaluation import Batch, check_labels, logits_of, split_batch
from .modes import evaluating


@dataclass(frozen=True)
class Judgement:
    """How one model does."""

    errors: NDArray[np.float64]
    """Of each image: cross-entropy with its label, or without labels with what the uncompressed model says; of a model
    without classes 1 - cosine to the uncompressed features."""
    top1: float | None
    """Share of the images whose most probable class is their label; None without labels."""
    agreement: float | None
    """Share that is put in the same class as by the uncompressed model; None without classes."""


@torch.inference_mode()
def judge(uncompressed: nn.Module, models: Sequence[nn.Module], loader: Iterable[Batch]) -> list[Judgement]:
    """How each of the models does on the same images, which are read once.

    Args:
        uncompressed: what the models are forms of.
        models: images (B, C, H, W) -> logits (B, classes), or features.
        loader: batches as :func:`diffrate_ext.evaluate` takes them, all with labels or all without.
    """
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in models]
    with evaluating(uncompressed, *models):
        for batch in loader:
            images, labels = split_batch(batch)
            reference = logits_of(uncompressed, images).double()
            for parts, model in zip(found, models, strict=True):
                parts.append(_judged(logits_of(model, images).double(), reference, labels, has_classes(uncompressed)))
    return [_together([torch.cat(column) for column in zip(*parts, strict=True)]) for parts in found]


def _judged(found: Tensor, reference: Tensor, labels: Tensor | None, classes: bool) -> tuple[Tensor, ...]:
    """Of each image its error, whether it agrees, and whether it is right, as far as these can be said."""
    if not classes:
        return (1 - F.cosine_similarity(found, reference),)
    agrees = found.argmax(1) == reference.argmax(1)
    if labels is None:
        return F.cross_entropy(found, reference.softmax(1), reduction="none"), agrees
    check_labels(labels, found)
    truth = labels.to(found.device, torch.int64)
    return F.cross_entropy(found, truth, reduction="none"), agrees, found.argmax(1) == truth


def _together(parts: Sequence[Tensor]) -> Judgement:
    errors, *shares = parts
    agreement, top1 = (*(float(share.double().mean()) for share in shares), None, None)[:2]
    return Judgement(errors.cpu().numpy(), top1, agreement)
