"""How good a compressed model is beside the uncompressed one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..answers import answer_of, has_classes
from ..errors import InputValueError
from ..evaluation import Batch, evaluate_all, split_batch
from ..modes import evaluating


@dataclass(frozen=True)
class Quality:
    """Of a model on validation images. Shares are in [0, 1]."""

    n: int
    """Number of images."""
    top1: float | None
    """Share of the images whose most probable class is their label; None without labels or classes."""
    loss: float | None
    """Mean cross-entropy in nats; None without labels or classes."""
    agreement: float | None
    """Share of the images that the uncompressed model, with its first weights, puts in the same class; None without
    classes."""
    cosine: float | None
    """Of a model without classes, between its features and the uncompressed model's; the mean over images."""

    @property
    def measure(self) -> tuple[str, float]:
        """What counts: top-1 where there are labels, else agreement, or cosine without classes."""
        for name, value in (("top-1", self.top1), ("agreement", self.agreement), ("cosine", self.cosine)):
            if value is not None:
                return name, value
        raise AssertionError("nothing was measured")


def qualities(uncompressed: nn.Module, model: nn.Module, loader: Iterable[Batch]) -> tuple[Quality, Quality]:
    """Of the uncompressed model, and of another, on the same images."""
    if not has_classes(uncompressed):
        n, cosine = _cosine(uncompressed, model, loader)
        return Quality(n, None, None, None, 1.0), Quality(n, None, None, None, cosine)
    first, second = evaluate_all([uncompressed, model], loader)
    return (
        Quality(first.n, first.top1, first.loss, 1.0, None),
        Quality(second.n, second.top1, second.loss, second.agreement, None),
    )


@torch.inference_mode()
def _cosine(uncompressed: nn.Module, model: nn.Module, loader: Iterable[Batch]) -> tuple[int, float]:
    own = next(model.parameters())
    n, total = 0, 0.0
    with evaluating(uncompressed, model):
        for batch in loader:
            images = split_batch(batch)[0].to(own.device, own.dtype)
            features, compressed = (answer_of(form(images)) for form in (uncompressed, model))
            total += float(F.cosine_similarity(features, compressed).sum())
            n += len(images)
    if n == 0:
        raise InputValueError("the loader gave no images")
    return n, total / n
