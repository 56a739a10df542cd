"""The images of a search, or of a fine-tuning.

What training sees in step s depends on the seed and s alone: not on the number of worker processes, nor on how the
batch is shared among training processes, nor on where a broken run resumed. So every random choice starts from a key of
its own, and nothing is drawn from generators that are carried along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler

from ..errors import InputValueError
from ..images.loading import (
    AUGMENTATION,
    Collated,
    ImageLoader,
    Sample,
    TransformedImages,
    make_loader,
    picture_mode,
    stack,
    transform_for,
)
from ..images.sources import ImageSource
from ..seeding import seeded

MAX_UNREADABLE_IN_A_ROW = 20

# Second parts of keys, so that no two kinds of choice use the same random numbers; no step has such a number.
_ORDER, _MIXING = AUGMENTATION - 1, AUGMENTATION + 1


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
                raise InputValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= start <= steps:
            raise InputValueError(f"start must lie in 0 .. steps = {steps}, got {start}")
        if not 0 <= rank < world:
            raise InputValueError(f"rank must lie in 0 .. world - 1 = {world - 1}, got {rank}")
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

    def __call__(self, samples: Sequence[Sample]) -> Collated:
        from timm.data.mixup import mixup_target

        unreadable = [u for sample in samples for u in sample.unreadable]
        for sample in samples:
            if sample.image is None:
                n, (name, reason) = len(sample.unreadable), sample.unreadable[0]
                failure = f"{n} pictures in a row could not be read, the first of them {name}: {reason}"
                return Collated(None, unreadable, failure)
        batch = stack(samples)
        images, labels = batch if isinstance(batch, tuple) else (batch, torch.zeros(len(batch), dtype=torch.int64))
        if not self.mix.mixup_enabled:
            if self.labelled and self.mix.label_smoothing > 0:
                batch = images, mixup_target(labels, self.mix.num_classes, smoothing=self.mix.label_smoothing)
            return Collated(batch, unreadable)
        targets = []
        for first in range(0, len(samples), 2):
            pair = slice(first, first + 2)
            with seeded(self.seed, _MIXING, *samples[first].key):
                images[pair], mixed = self.mix(images[pair], labels[pair])
            targets.append(mixed)
        return Collated((images, torch.cat(targets)) if self.labelled else images, unreadable)


def training_loader(
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
    """The batches of a run of training, steps ``start`` .. ``steps - 1``, augmented as in DeiT.

    Batches are (images, targets): images (batch_size, C, H, W) float32; targets (batch_size, classes) float32
    probabilities, or, where mixup, cutmix and smoothing are all 0, labels (batch_size,) int64. Of a source without
    labels they are images alone.

    Args:
        source: the pictures, with the model's classes (:func:`~diffrate_ext.images.sources.match_classes`).
        model: a timm model, which says size, interpolation, mean and standard deviation.
        batch_size: images for this process in each step; even, where images are mixed.
        steps, seed, start, rank, world: as for :class:`StepSampler`.
        augment: as in DeiT: random crops, flips, RandAugment, random erasing; for one-channel models light crops and
            flips. Else the images are those of an evaluation.
        mixup, cutmix, smoothing: as for :class:`PairMixup`.
        workers: processes that read and transform images; 0: this one does. They change nothing else.

    Raises:
        InputValueError: arguments out of range; while iterating, 20 pictures in a row that cannot be read.
    """
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not value >= 0:
            raise InputValueError(f"{name} must not be negative, got {value}")
    if not 0 <= smoothing < 1:
        raise InputValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    if batch_size % 2 and (mixup > 0 or cutmix > 0):
        raise InputValueError(
            f"batch_size must be even for mixup and cutmix, which mix pairs of images; got {batch_size}"
        )
    sampler = StepSampler(len(source), batch_size, steps, seed, start=start, rank=rank, world=world)
    images = TransformedImages(
        source, transform_for(model, augment), picture_mode(model), seed=seed, attempts=MAX_UNREADABLE_IN_A_ROW
    )
    collate = PairMixup(None if source.classes is None else len(source.classes), mixup, cutmix, smoothing, seed)
    return make_loader(images, sampler, collate, workers)
