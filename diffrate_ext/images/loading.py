"""Batches of images: read, transformed as timm does it for a model, and collated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import InputValueError
from ..evaluation import Batch
from ..seeding import seeded
from .data_config import data_config
from .pictures import reason_of
from .sources import ImageSource

AUGMENTATION = 2**32 - 2
"""Second part of the keys of random choices of the transform; no search step has such a number."""


class Sample(NamedTuple):
    """One image, or why there is none."""

    key: tuple[int, int]
    """(epoch, index) as asked for."""
    image: Tensor | None
    """(C, H, W), None if it could not be read."""
    label: int | None
    unreadable: list[tuple[str, str]]
    """Names of the pictures that could not be read on the way, and why."""


class TransformedImages(Dataset[Sample]):
    """The transformed images of a source at (epoch, index), random choices of the transform seeded by both.

    Args:
        source: the pictures.
        transform: picture -> tensor (C, H, W).
        mode: the pictures' mode, "RGB" or "L".
        seed: of the transform's random choices.
        attempts: in place of a picture that cannot be read comes the next one that can, out of so many.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Tensor],
        mode: str,
        *,
        seed: int = 0,
        attempts: int = 1,
    ) -> None:
        self.source, self.transform, self.mode, self.seed = source, transform, mode, seed
        self.attempts = min(attempts, len(source))

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        unreadable = []
        for attempt in range(self.attempts):
            i = (index + attempt) % len(self.source)
            try:
                picture, label = self.source.read(i)
                picture = picture.convert(self.mode)
            except Exception as error:  # PIL's decoders raise almost anything on a damaged file
                unreadable.append((self.source.name(i), reason_of(error)))
                continue
            with seeded(self.seed, AUGMENTATION, epoch, index):
                return Sample(key, self.transform(picture), label, unreadable)
        return Sample(key, None, None, unreadable)


class Collated(NamedTuple):
    """What a worker hands over. Warnings and errors raised in a worker would come out garbled, or not at all."""

    batch: Batch | None
    unreadable: list[tuple[str, str]]
    failure: str | None = None


def stack(samples: Sequence[Sample]) -> Batch:
    images = torch.stack([sample.image for sample in samples if sample.image is not None])
    labels = [sample.label for sample in samples if sample.label is not None]
    return (images, torch.tensor(labels)) if labels else images


def _leave_out_unreadable(samples: Sequence[Sample]) -> Collated:
    readable = [sample for sample in samples if sample.image is not None]
    return Collated(stack(readable) if readable else None, [u for sample in samples for u in sample.unreadable])


class ImageLoader:
    """Batches, read ahead by worker processes: (images, targets) or images alone.

    Pictures that could not be read are named by a warning, each once.
    """

    transform: Callable[[Image.Image], Tensor]
    """What it does to each picture."""

    def __init__(self, images: TransformedImages, loader: DataLoader[Any]) -> None:
        self.transform, self._loader, self._where = images.transform, loader, images.source.where
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = 0
        for batch, unreadable, failure in self._loader:
            if failure is not None:
                raise InputValueError(f"{self._where}: {failure}")
            for name, reason in unreadable:
                if name not in self._reported:
                    self._reported.add(name)
                    warnings.warn(f"left out {name}, which cannot be read: {reason}", stacklevel=2)
            if batch is not None:
                batches += 1
                yield batch
        if self._reported and not batches:
            raise InputValueError(f"{self._where}: none of the {len(self._reported)} pictures could be read")


def evaluation_loader(source: ImageSource, model: nn.Module, *, batch_size: int, workers: int = 0) -> ImageLoader:
    """All images of a source in order, transformed as timm evaluates the model: (images, labels), or images alone.

    Pictures that cannot be read are left out, with a warning.

    Args:
        source: the pictures, with the model's classes (:func:`~diffrate_ext.images.sources.match_classes`).
        model: a timm model, which says size, crop, interpolation, mean and standard deviation.
        batch_size: images in each batch but the last.
        workers: processes that read and transform images; 0: this one does.

    Raises:
        InputValueError: arguments out of range; at the end, if none of the pictures could be read.
    """
    if batch_size < 1:
        raise InputValueError(f"batch_size must be at least 1, got {batch_size}")
    keys = [(0, i) for i in range(len(source))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    images = TransformedImages(source, transform_for(model, augment=False), picture_mode(model))
    return make_loader(images, batches, _leave_out_unreadable, workers)


def make_loader(
    images: TransformedImages,
    batches: Any,
    collate: Callable[[Sequence[Sample]], Collated],
    workers: int,
) -> ImageLoader:
    if workers < 0:
        raise InputValueError(f"workers must not be negative, got {workers}")
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # of its own: without one it draws from torch's global generator
    )
    return ImageLoader(images, loader)


def picture_mode(model: nn.Module) -> str:
    channels = data_config(model)["input_size"][0]
    if channels not in (1, 3):
        raise InputValueError(f"pictures have 3 channels, or 1 for grey ones; the model wants {channels}")
    return "L" if channels == 1 else "RGB"


def transform_for(model: nn.Module, augment: bool) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform

    config = data_config(model)
    if not augment:
        return create_transform(**config, is_training=False)
    if picture_mode(model) == "L":  # RandAugment and the large crops are made for photographs
        return create_transform(**config, is_training=True, scale=(0.8, 1.0), ratio=(0.9, 1 / 0.9), color_jitter=0.0)
    transform = create_transform(
        **config,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
    )
    # at its greatest magnitude, 10, timm 1.0 keeps no bit of each colour, which Pillow refuses since version 13
    for operation in (operation for step in transform.transforms for operation in getattr(step, "ops", ())):
        if operation.name == "PosterizeIncreasing":
            operation.magnitude_max = 9.99
    return transform
