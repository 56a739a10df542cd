"""What a search sees of its images."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from picture_files import (
    Model,
    assert_same,
    brightness,
    class_folders,
    colour,
    damaged_pictures,
    flat,
    warned,
    write,
)
from PIL import Image

from diffrate_ext import embedded
from diffrate_ext.images.loading import evaluation_loader
from diffrate_ext.images.sources import open_images, without_labels
from diffrate_ext.training.data import StepSampler, training_loader


def test_every_epoch_shows_every_image_once_in_its_own_order():
    stream = [key for batch in StepSampler(10, 4, 5, seed=3) for key in batch]
    assert [epoch for epoch, _ in stream] == [0] * 10 + [1] * 10
    first, second = ([index for e, index in stream if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != [index for batch in StepSampler(10, 4, 5, seed=4) for epoch, index in batch if epoch == 0]


@pytest.mark.parametrize("length", [3, 10, 100])
def test_processes_and_resumed_runs_share_one_stream(length):
    whole = list(StepSampler(length, 8, 7, seed=1))
    parts = [list(StepSampler(length, 2, 7, seed=1, rank=rank, world=4)) for rank in range(4)]
    assert [[*a, *b, *c, *d] for a, b, c, d in zip(*parts, strict=True)] == whole
    for start in (0, 4, 7):
        resumed = StepSampler(length, 8, 7, seed=1, start=start)
        assert len(resumed) == 7 - start
        assert list(resumed) == whole[start:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start": 6}, "start must lie in 0 .. steps = 5, got 6"),
        ({"rank": 2, "world": 2}, "rank must lie in 0 .. world - 1 = 1, got 2"),
    ],
)
def test_a_sampler_out_of_range(change, words):
    with pytest.raises(ValueError, match=words):
        StepSampler(**{"length": 10, "batch_size": 2, "steps": 5, **change})


# --- loaders


@pytest.fixture
def source(tmp_path):
    return open_images(class_folders(tmp_path / "source"))


def test_search_batches(source):
    loader = training_loader(source, Model(), batch_size=4, steps=5)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    for images, targets in batches:
        assert images.shape == (4, 3, 16, 16)
        assert images.dtype == targets.dtype == torch.float32
        assert targets.shape == (4, 3)
        assert targets.min() >= 0.1 / 3 - 1e-6
        torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_workers_processes_and_resuming_change_nothing(source):
    def batches(**options):
        return flat(training_loader(source, Model(), steps=5, seed=7, **{"batch_size": 8, **options}))

    whole = batches()
    assert_same(batches(workers=2), whole)
    assert_same(batches(start=3), whole[3:])
    ranks = [batches(batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    joined = [[torch.cat(t) for t in zip(*step, strict=True)] for step in zip(*ranks, strict=True)]
    assert_same(joined, whole)
    other = flat(training_loader(source, Model(), batch_size=8, steps=1, seed=8))
    assert not torch.equal(other[0][0], whole[0][0])


def test_an_image_looks_different_in_every_epoch(tmp_path):
    write(tmp_path / "a.png")
    loader = training_loader(open_images(tmp_path), Model(), batch_size=1, steps=6, mixup=0, cutmix=0)
    assert len({images.numpy().tobytes() for images in loader}) == 6


def test_mixup_mixes_neighbours_and_their_labels_alike(tmp_path):
    for value, name in ((0, "black"), (255, "white")):
        for i in range(4):
            colour(tmp_path / name / f"{i}.png", value)
    source = open_images(tmp_path)
    loader = training_loader(
        source, Model(), batch_size=8, steps=4, seed=2, augment=False, mixup=1.0, cutmix=0, smoothing=0
    )
    mixed = 0
    for images, targets in loader:
        grey = (images * 0.25 + 0.5).mean((1, 2, 3))
        torch.testing.assert_close(grey, targets[:, 1], rtol=0, atol=1e-6)
        white = targets[0::2, 1] + targets[1::2, 1]  # pictures in each pair: mixing them keeps their sum
        torch.testing.assert_close(white, white.round())
        mixed += int(((grey > 0.01) & (grey < 0.99)).sum())
    assert mixed > 4
    shares = {round(float(t), 6) for _, targets in loader for t in targets[:, 1]}
    assert len(shares) > 4  # each pair has a share of its own


def test_cutmix_keeps_every_pixel_and_counts_it(tmp_path):
    for value, name in ((0, "black"), (255, "white")):
        for i in range(4):
            colour(tmp_path / name / f"{i}.png", value)
    loader = training_loader(
        open_images(tmp_path), Model(), batch_size=8, steps=4, augment=False, mixup=0, cutmix=1.0, smoothing=0
    )
    for images, targets in loader:
        pixels = images * 0.25 + 0.5
        assert set(pixels.unique().tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(pixels.mean((1, 2, 3)), targets[:, 1], rtol=0, atol=1e-6)


def test_without_mixing_targets_are_labels(source):
    options = {"batch_size": 3, "steps": 3, "mixup": 0, "cutmix": 0}
    keys = list(StepSampler(9, 3, 3))
    expected = [[source.read(i)[1] for _, i in batch] for batch in keys]
    plain = list(training_loader(source, Model(), smoothing=0, **options))
    assert [targets.tolist() for _, targets in plain] == expected
    assert plain[0][1].dtype == torch.int64
    for (_, targets), truth in zip(training_loader(source, Model(), smoothing=0.3, **options), expected, strict=True):
        torch.testing.assert_close(targets, torch.eye(3)[truth] * 0.7 + 0.1)


def test_without_labels_the_same_images_come_alone(source):
    with_labels = flat(training_loader(source, Model(), batch_size=4, steps=3))
    alone = flat(training_loader(without_labels(source), Model(), batch_size=4, steps=3))
    assert_same(alone, [[images] for images, _ in with_labels])


def test_the_global_generators_go_on_undisturbed(source):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    list(training_loader(source, Model(), batch_size=4, steps=3))
    list(evaluation_loader(source, Model(), batch_size=4))
    assert draw() == expected


def test_what_else_draws_random_numbers_changes_nothing(source):
    first = flat(training_loader(source, Model(), batch_size=4, steps=3))
    random.random(), np.random.rand(), torch.rand(1)
    assert_same(flat(training_loader(source, Model(), batch_size=4, steps=3)), first)


def test_grey_models_see_grey_pictures_lightly_augmented(source):
    model = embedded.build_model()
    for images in (source, open_images(None)):
        batch, _ = next(iter(training_loader(images, model, batch_size=4, steps=1)))
        assert batch.shape == (4, 1, 28, 28)
    embedded_images = without_labels(open_images(None))
    options = {"batch_size": 64, "steps": 1, "mixup": 0, "cutmix": 0}
    augmented, plain = (
        next(iter(training_loader(embedded_images, model, augment=a, **options))) for a in (True, False)
    )
    flipped = plain.flip(-1)
    error = torch.stack([(augmented - p).square().mean((1, 2, 3)) for p in (plain, flipped)])
    # still the same picture or its mirror image, but changed: the typical square of a pixel is 1
    assert error.min(0).values.median() < 0.3
    assert error.min(0).values.median() > 1e-3
    assert 16 < int((error[0] < error[1]).sum()) < 48


def test_colour_pictures_are_augmented_as_in_deit(tmp_path):
    colour(tmp_path / "a.png", 100)
    loader = training_loader(open_images(tmp_path), Model(), batch_size=200, steps=1, mixup=0, cutmix=0)
    pixels = next(iter(loader)) * 0.25 + 0.5
    # erased parts are filled with normal noise, which no picture can hold; in a quarter of the images, +- 3 deviations
    noisy = ((pixels < -0.01) | (pixels > 1.01)).any(3).any(2).any(1)
    assert 0.15 < noisy.float().mean() < 0.35
    # flips and changes of colour leave it of one colour; 5 of RandAugment's 15 operations do not
    uneven = pixels[~noisy].flatten(2).std(2).amax(1) > 0.01
    assert 0.15 < uneven.float().mean() < 0.45


def test_randaugment_works_at_its_greatest_magnitude(source):
    transform = training_loader(source, Model(), batch_size=2, steps=1).transform
    picture, _ = source.read(0)
    operations = [operation for step in transform.transforms for operation in getattr(step, "ops", ())]
    assert len(operations) == 15
    for operation in operations:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0.0
        assert np.ptp(np.asarray(operation(picture))) > 0, f"{operation.name} leaves nothing of the picture"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_pictures_of_any_shape(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    tiny = open_images(tmp_path)
    assert next(iter(training_loader(tiny, Model(), batch_size=2, steps=1))).shape == (2, 3, 16, 16)
    assert next(iter(evaluation_loader(tiny, Model(), batch_size=2))).shape == (1, 3, 16, 16)


def test_colour_models_see_grey_pictures_too():
    batch, _ = next(iter(training_loader(open_images(None), Model(), batch_size=4, steps=1)))
    assert batch.shape == (4, 3, 16, 16)


def test_loaders_out_of_range(source):
    def load(model=None, **options):
        return training_loader(source, model or Model(), **{"batch_size": 4, "steps": 1, **options})

    with pytest.raises(ValueError, match=r"must be even for mixup and cutmix.*got 3"):
        load(batch_size=3)
    with pytest.raises(ValueError, match=r"mixup must not be negative, got -0\.5"):
        load(mixup=-0.5)
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\), got 1"):
        load(smoothing=1)
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        load(workers=-1)
    with pytest.raises(ValueError, match="the model wants 4"):
        load(model=Model(channels=4))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluation_loader(source, Model(), batch_size=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_search_the_next_readable_picture_stands_in(workers, tmp_path):
    damaged = damaged_pictures(tmp_path)
    loader = training_loader(
        damaged, Model(), batch_size=4, steps=4, augment=False, mixup=0, cutmix=0, smoothing=0, workers=workers
    )
    with pytest.warns(UserWarning, match="cannot be read") as record:
        found = brightness(flat(loader))
    stand_in = {2: 4, 3: 4, 7: 0}
    order = [i for batch in StepSampler(8, 4, 4) for _, i in batch]
    assert found == [30 * stand_in.get(i, i) for i in order]
    messages = warned(record)
    assert len(messages) == 3  # once each in two epochs
    assert "2.png, which cannot be read: not a picture in a known format" in messages[0]
