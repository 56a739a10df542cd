"""Accuracy of a model on labelled images, and its agreement with another model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .answers import answer_of, has_classes
from .errors import InputTypeError, InputValueError
from .modes import evaluating

Batch: TypeAlias = "Tensor | Sequence[Tensor]"
"""Images (B, C, H, W), or (images, labels)."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured. Shares are in [0, 1]."""

    n: int
    """Number of images."""
    top1: float | None
    """Share of the images whose most probable class is their label; None without labels or classes."""
    loss: float | None
    """Mean cross-entropy in nats; None without labels or classes."""
    agreement: float | None
    """Share of the images that the reference puts in the same class; None without a reference or classes."""
    predictions: Tensor = field(repr=False, compare=False)
    """Most probable class of each image, (n,) int64 on the CPU; of a model without classes the largest feature."""
    cosine: float | None = None
    """Of a model without classes, between its features and the reference's; the mean over images."""


def evaluate(model: nn.Module, loader: Iterable[Batch], reference: nn.Module | Tensor | None = None) -> Evaluation:
    """Top-1 accuracy, loss, and agreement with a reference model.

    Both models run in evaluation mode, without gradients, on the device and in the dtype of their own parameters, and
    each of their modules is left in the mode it came in.

    Args:
        model: a classifier, images (B, C, H, W) -> logits (B, classes), or a model without classes (``num_classes=0``,
            or one of transformers that is no classifier), whose features are compared; compressed or not.
        loader: batches, each either images or (images, labels) with labels (B,) of an integer dtype. A DataLoader,
            or any other iterable.
        reference: the model to agree with (usually the uncompressed one), or the predictions (n,) of an earlier
            evaluation of the same images in the same order, which saves running it again.

    Raises:
        InputValueError: no images, only some batches with labels, labels that do not fit the images or the classes,
            reference predictions of another number of images, or such of a model without classes.
        InputTypeError: batches, logits or labels of another type.
    """
    classes = has_classes(model)
    if isinstance(reference, Tensor) and not classes:
        raise InputValueError("the model has no classes to agree on: the reference must be a model, for its features")
    found = evaluate_all([model, *([reference] if isinstance(reference, nn.Module) else [])], loader)
    if reference is None:
        return replace(found[0], cosine=None)
    if not classes:
        return replace(found[0], cosine=found[1].cosine)
    wanted = reference.cpu() if isinstance(reference, Tensor) else found[1].predictions
    if wanted.shape != found[0].predictions.shape:
        raise InputValueError(f"reference holds predictions of shape {tuple(wanted.shape)}, expected ({found[0].n},)")
    return _agreeing(found[0], wanted)


def evaluate_all(models: Sequence[nn.Module], loader: Iterable[Batch]) -> list[Evaluation]:
    """Several models on the same images, which are read once. Agreement and cosine are with the first model.

    Arguments and errors as for :func:`evaluate`.
    """
    with evaluating(*models):
        return _evaluate_all(models, loader)


@torch.inference_mode()
def _evaluate_all(models: Sequence[nn.Module], loader: Iterable[Batch]) -> list[Evaluation]:
    predictions: list[list[Tensor]] = [[] for _ in models]
    hits, losses, cosines = [0] * len(models), [0.0] * len(models), [0.0] * len(models)
    classes, reference = has_classes(models[0]), torch.empty(0)
    n, labelled = 0, False
    for batch in loader:
        images, labels = split_batch(batch)
        if not classes:
            labels = None  # they say nothing about features
        if n and (labels is not None) != labelled:
            raise InputValueError("some batches of the loader have labels and some have none")
        labelled = labels is not None
        n += len(images)
        for i, model in enumerate(models):
            logits = logits_of(model, images)
            predictions[i].append(logits.argmax(1).cpu())
            if not classes:
                features = logits.to("cpu", torch.float32)
                reference = features if i == 0 else reference
                cosines[i] += float(F.cosine_similarity(features, reference).sum())
            if labels is not None:
                check_labels(labels, logits)
                truth = labels.to(logits.device, torch.int64)
                hits[i] += int((logits.argmax(1) == truth).sum())
                losses[i] += float(F.cross_entropy(logits.float(), truth, reduction="sum"))
    if n == 0:
        raise InputValueError("the loader gave no images")
    found = [
        Evaluation(n, hit / n if labelled else None, loss / n if labelled else None, None, torch.cat(parts))
        for hit, loss, parts in zip(hits, losses, predictions, strict=True)
    ]
    if not classes:
        return [replace(one, cosine=cosine / n) for one, cosine in zip(found, cosines, strict=True)]
    return [found[0], *(_agreeing(evaluation, found[0].predictions) for evaluation in found[1:])]


def _agreeing(evaluation: Evaluation, predictions: Tensor) -> Evaluation:
    return replace(evaluation, agreement=int((evaluation.predictions == predictions).sum()) / evaluation.n)


def split_batch(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch that a loader gave.

    Raises:
        InputTypeError: it is neither images nor (images, labels).
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise InputTypeError(
        f"a batch of the loader must be images or (images, labels), tensors both, got {type(batch).__name__}"
    )


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of images, which go to its device and dtype: logits, or features.

    Raises:
        InputTypeError, InputValueError: it is not one row for each image.
    """
    own = next((p for p in model.parameters() if p.is_floating_point()), None)
    logits = answer_of(model(images if own is None else images.to(own.device, own.dtype)))
    if logits.ndim != 2 or len(logits) != len(images):
        raise InputValueError(f"the model must return logits ({len(images)}, classes), got shape {tuple(logits.shape)}")
    return logits


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise when labels do not fit logits (B, classes): InputTypeError or InputValueError."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputTypeError(f"labels must have an integer dtype, got {labels.dtype}")
    images, classes = logits.shape
    if labels.shape != (images,):
        raise InputValueError(f"labels must have shape ({images},) beside {images} images, got {tuple(labels.shape)}")
    if images and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        found = f"{int(labels.min())} .. {int(labels.max())}"
        raise InputValueError(f"labels must lie in 0 .. {classes - 1}, the model's classes; got {found}")
