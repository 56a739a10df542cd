"""Accuracy of a model on labelled images, and its agreement with another model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured. Shares are in [0, 1]."""

    n: int
    """Number of images."""
    top1: float | None
    """Share of the images whose most probable class is their label; None without labels."""
    loss: float | None
    """Mean cross-entropy in nats; None without labels."""
    agreement: float | None
    """Share of the images that the reference puts in the same class; None without a reference."""
    predictions: Tensor = field(repr=False, compare=False)
    """Most probable class of each image, (n,) int64 on the CPU."""


def evaluate(
    model: nn.Module, loader: Iterable[Tensor | Sequence[Tensor]], reference: nn.Module | Tensor | None = None
) -> Evaluation:
    """Top-1 accuracy, loss, and agreement with a reference model.

    Both models run in evaluation mode, without gradients, on the device and in the dtype of their own parameters, and
    are left in the mode they came in.

    Args:
        model: a classifier, images (B, C, H, W) -> logits (B, classes), compressed or not.
        loader: batches, each either images or (images, labels) with labels (B,) of an integer dtype. A DataLoader,
            or any other iterable.
        reference: the model to agree with (usually the uncompressed one), or the predictions (n,) of an earlier
            evaluation of the same images in the same order, which saves running it again.

    Raises:
        ValueError: no images, only some batches with labels, labels that do not fit the images or the classes, or
            reference predictions of another number of images.
        TypeError: batches, logits or labels of another type.
    """
    models = [model, *([reference] if isinstance(reference, nn.Module) else [])]
    modes = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        return _evaluate(model, loader, reference)
    finally:
        for m, training in zip(models, modes, strict=True):
            m.train(training)


@torch.inference_mode()
def _evaluate(
    model: nn.Module, loader: Iterable[Tensor | Sequence[Tensor]], reference: nn.Module | Tensor | None
) -> Evaluation:
    predictions: list[Tensor] = []
    expected: list[Tensor] = []
    hits, loss, labelled = 0, 0.0, False
    for batch in loader:
        images, labels = _split_batch(batch)
        if predictions and (labels is not None) != labelled:
            raise ValueError("some batches of the loader have labels and some have none")
        labelled = labels is not None
        logits = _logits(model, images)
        predictions.append(logits.argmax(1).cpu())
        if isinstance(reference, nn.Module):
            expected.append(_logits(reference, images).argmax(1).cpu())
        if labels is not None:
            _check_labels(labels, logits)
            truth = labels.to(logits.device, torch.int64)
            hits += int((logits.argmax(1) == truth).sum())
            loss += float(F.cross_entropy(logits.float(), truth, reduction="sum"))
    found = torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64)
    n = len(found)
    if n == 0:
        raise ValueError("the loader gave no images")
    agreement = None
    if reference is not None:
        wanted = reference.cpu() if isinstance(reference, Tensor) else torch.cat(expected)
        if wanted.shape != found.shape:
            raise ValueError(f"reference holds predictions of shape {tuple(wanted.shape)}, expected ({n},)")
        agreement = int((found == wanted).sum()) / n
    return Evaluation(
        n=n,
        top1=hits / n if labelled else None,
        loss=loss / n if labelled else None,
        agreement=agreement,
        predictions=found,
    )


def _split_batch(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise TypeError(
        f"a batch of the loader must be images or (images, labels), tensors both, got {type(batch).__name__}"
    )


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    own = next((p for p in model.parameters() if p.is_floating_point()), None)
    logits = model(images if own is None else images.to(own.device, own.dtype))
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return logits (B, classes) as one tensor, got {type(logits).__name__}")
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"the model must return logits ({len(images)}, classes), got shape {tuple(logits.shape)}")
    return logits


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
    images, classes = logits.shape
    if labels.shape != (images,):
        raise ValueError(f"labels must have shape ({images},) beside {images} images, got {tuple(labels.shape)}")
    if images and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        found = f"{int(labels.min())} .. {int(labels.max())}"
        raise ValueError(f"labels must lie in 0 .. {classes - 1}, the model's classes; got {found}")
