"""Batches of images for a search and an evaluation.

What a search sees in step s depends on the seed and s alone: not on the number of worker processes, nor on how the
batch is shared among training processes, nor on where a broken run resumed. So every random choice starts from a key of
its own, and nothing is drawn from generators that are carried along.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .pictures import reason_of
from .sources import ImageSource

Batch: TypeAlias = "Tensor | tuple[Tensor, Tensor]"

MAX_UNREADABLE_IN_A_ROW = 20

# the second part of every key, so that no two kinds of choice use the same random numbers; no step has such a number
_ORDER, _AUGMENTATION, _MIXING = range(2**32 - 3, 2**32)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within it, ``random``, numpy and torch (CPU) draw from generators that start from ``key``, whole numbers >= 0.

    After it their global generators go on from where they were. timm's augmentation draws from all three.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(int(words[0]))
        np.random.seed(words[1:3])
        torch.default_generator.manual_seed(int(words[3]))  # torch.manual_seed would seed the GPUs, too
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Which images each step sees: the batches (epoch, index) of the steps ``start`` .. ``steps - 1``, for one process.

    The images of one epoch, in a random order of its own, follow those of the one before; batches straddle epochs.
    Step s takes the s-th run of ``world * batch_size`` of them, and process ``rank`` the rank-th part of this run.

    Args:
        length: number of images in the source.
        batch_size: images for this process in each step.
        steps: steps of the whole run.
        seed: of the order.
        start: the first step to give.
        rank: of this process, 0 .. world - 1.
        world: number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, steps: int, seed: int = 0, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        for name, value, least in (("length", length, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= start <= steps:
            raise ValueError(f"start must lie in 0 .. steps = {steps}, got {start}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0 .. world - 1 = {world - 1}, got {rank}")
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                wanted, place = divmod(position, self.length)
                if wanted != epoch:
                    epoch, order = wanted, self._order(wanted)
                batch.append((epoch, int(order[place])))
            yield batch

    def _order(self, epoch: int) -> np.ndarray:
        with seeded(self.seed, _ORDER, epoch, 0):
            return torch.randperm(self.length).numpy()


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
            with seeded(self.seed, _AUGMENTATION, epoch, index):
                return Sample(key, self.transform(picture), label, unreadable)
        return Sample(key, None, None, unreadable)


class _Collated(NamedTuple):
    """What a worker hands over. Warnings and errors raised in a worker would come out garbled, or not at all."""

    batch: Batch | None
    unreadable: list[tuple[str, str]]
    failure: str | None = None


def _stack(samples: Sequence[Sample]) -> Batch:
    images = torch.stack([sample.image for sample in samples if sample.image is not None])
    labels = [sample.label for sample in samples if sample.label is not None]
    return (images, torch.tensor(labels)) if labels else images


def _leave_out_unreadable(samples: Sequence[Sample]) -> _Collated:
    readable = [sample for sample in samples if sample.image is not None]
    return _Collated(_stack(readable) if readable else None, [u for sample in samples for u in sample.unreadable])


class PairMixup:
    """Collates samples and mixes each with its neighbour, the 1st with the 2nd, the 3rd with the 4th and so on.

    timm's Mixup, its random choices seeded for each pair by (epoch, index) of the first image.

    Args:
        classes: number of classes; None without labels, then only the images are mixed.
        mixup, cutmix: the alphas of the two ways of mixing; each pair takes one of them, at random; 0 turns one off.
        smoothing: of the labels, as in timm: share of the probability that is spread over all classes.
        seed: of the random choices.
    """

    def __init__(self, classes: int | None, mixup: float, cutmix: float, smoothing: float, seed: int) -> None:
        from timm.data import Mixup

        self.labelled, self.seed = classes is not None, seed
        self.mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes or 1)
        self.mix.mixup_enabled = mixup > 0 or cutmix > 0

    def __call__(self, samples: Sequence[Sample]) -> _Collated:
        from timm.data.mixup import mixup_target

        unreadable = [u for sample in samples for u in sample.unreadable]
        for sample in samples:
            if sample.image is None:
                n, (name, reason) = len(sample.unreadable), sample.unreadable[0]
                failure = f"{n} pictures in a row could not be read, the first of them {name}: {reason}"
                return _Collated(None, unreadable, failure)
        batch = _stack(samples)
        images, labels = batch if isinstance(batch, tuple) else (batch, torch.zeros(len(batch), dtype=torch.int64))
        if not self.mix.mixup_enabled:
            if self.labelled and self.mix.label_smoothing > 0:
                batch = images, mixup_target(labels, self.mix.num_classes, smoothing=self.mix.label_smoothing)
            return _Collated(batch, unreadable)
        targets = []
        for first in range(0, len(samples), 2):
            pair = slice(first, first + 2)
            with seeded(self.seed, _MIXING, *samples[first].key):
                images[pair], mixed = self.mix(images[pair], labels[pair])
            targets.append(mixed)
        return _Collated((images, torch.cat(targets)) if self.labelled else images, unreadable)


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
                raise ValueError(f"{self._where}: {failure}")
            for name, reason in unreadable:
                if name not in self._reported:
                    self._reported.add(name)
                    warnings.warn(f"left out {name}, which cannot be read: {reason}", stacklevel=2)
            if batch is not None:
                batches += 1
                yield batch
        if self._reported and not batches:
            raise ValueError(f"{self._where}: none of the {len(self._reported)} pictures could be read")


def search_loader(
    source: ImageSource,
    model: nn.Module,
    *,
    batch_size: int,
    steps: int,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    augment: bool = True,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    smoothing: float = 0.1,
    workers: int = 0,
) -> ImageLoader:
    """The batches of a search, steps ``start`` .. ``steps - 1``, augmented as in DeiT.

    Batches are (images, targets): images (batch_size, C, H, W) float32; targets (batch_size, classes) float32
    probabilities, or, where mixup, cutmix and smoothing are all 0, labels (batch_size,) int64. Of a source without
    labels they are images alone.

    Args:
        source: the pictures, with the model's classes (:func:`~diffrate_ext.image_data.match_classes`).
        model: a timm model, which says size, interpolation, mean and standard deviation.
        batch_size: images for this process in each step; even, where images are mixed.
        steps, seed, start, rank, world: as for :class:`StepSampler`.
        augment: as in DeiT: random crops, flips, RandAugment, random erasing; for one-channel models light crops and
            flips. Else the images are those of an evaluation.
        mixup, cutmix, smoothing: as for :class:`PairMixup`.
        workers: processes that read and transform images; 0: this one does. They change nothing else.

    Raises:
        ValueError: arguments out of range; while iterating, 20 pictures in a row that cannot be read.
    """
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    if batch_size % 2 and (mixup > 0 or cutmix > 0):
        raise ValueError(f"batch_size must be even for mixup and cutmix, which mix pairs of images; got {batch_size}")
    sampler = StepSampler(len(source), batch_size, steps, seed, start=start, rank=rank, world=world)
    images = TransformedImages(
        source, _transform(model, augment), _mode(model), seed=seed, attempts=MAX_UNREADABLE_IN_A_ROW
    )
    collate = PairMixup(None if source.classes is None else len(source.classes), mixup, cutmix, smoothing, seed)
    return _loader(images, sampler, collate, workers)


def evaluation_loader(source: ImageSource, model: nn.Module, *, batch_size: int, workers: int = 0) -> ImageLoader:
    """All images of a source in order, transformed as timm evaluates the model: (images, labels), or images alone.

    Pictures that cannot be read are left out, with a warning.

    Args:
        source: the pictures, with the model's classes (:func:`~diffrate_ext.image_data.match_classes`).
        model: a timm model, which says size, crop, interpolation, mean and standard deviation.
        batch_size: images in each batch but the last.
        workers: processes that read and transform images; 0: this one does.

    Raises:
        ValueError: arguments out of range; at the end, if none of the pictures could be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    keys = [(0, i) for i in range(len(source))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    images = TransformedImages(source, _transform(model, augment=False), _mode(model))
    return _loader(images, batches, _leave_out_unreadable, workers)


def _loader(
    images: TransformedImages,
    batches: Any,
    collate: Callable[[Sequence[Sample]], _Collated],
    workers: int,
) -> ImageLoader:
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # of its own: without one it draws from torch's global generator
    )
    return ImageLoader(images, loader)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model: input size (C, H, W), mean, standard deviation, interpolation, crop."""
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    # a model made for another image size than its weights knows that in its patch embedding only
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size:
        config["input_size"] = (config["input_size"][0], *size)
    return config


def _mode(model: nn.Module) -> str:
    channels = data_config(model)["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"pictures have 3 channels, or 1 for grey ones; the model wants {channels}")
    return "L" if channels == 1 else "RGB"


def _transform(model: nn.Module, augment: bool) -> Callable[[Image.Image], Tensor]:
    from timm.data import create_transform

    config = data_config(model)
    if not augment:
        return create_transform(**config, is_training=False)
    if _mode(model) == "L":  # RandAugment and the large crops are made for photographs
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
