"""Where images come from, and what a search and an evaluation see of them."""

from __future__ import annotations

import pickle
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffrate_ext import embedded
from diffrate_ext.images.sampling import StepSampler, data_config, evaluation_loader, search_loader
from diffrate_ext.images.sources import match_classes, open_images, without_labels

CLASSES = ["ant", "bee", "cow"]


class Model(nn.Module):
    """As much of a timm model as loaders look at."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (channels, 16, 16),
            "mean": (0.5,) * channels,
            "std": (0.25,) * channels,
            "crop_pct": 1.0,
        }


def write(path: Path, seed: int = 0, size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def colour(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(path)
    return path


def class_folders(root: Path, classes=CLASSES, each: int = 3) -> Path:
    for c, name in enumerate(classes):
        for i in range(each):
            write(root / name / f"{i}.png", seed=100 * c + i)
    return root


def names(source) -> list[str]:
    return [Path(source.name(i)).name for i in range(len(source))]


def labels(source) -> list[int | None]:
    return [source.read(i)[1] for i in range(len(source))]


def flat(batches):
    """Every batch as a list of tensors, copied out of what the workers share."""
    return [[t.clone() for t in (batch if isinstance(batch, tuple) else (batch,))] for batch in batches]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for some, others in zip(found, expected, strict=True):
        assert len(some) == len(others)
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# Sources


@pytest.mark.parametrize(("purpose", "split"), [("search", "search"), ("evaluation", "test")])
def test_embedded_images(purpose, split):
    images, truth = embedded.load_images(split)
    source = open_images(None, purpose=purpose)
    assert len(source) == len(images)
    assert source.classes == list(embedded.CLASSES)
    assert source.where == f"the embedded {split} images"
    picture, label = source.read(7)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), images[7, 0].numpy())
    assert label == truth[7]


def test_embedded_images_have_two_splits():
    assert len(open_images(None, split="test")) == 2000
    with pytest.raises(ValueError, match="'search' and 'test', got 'train'"):
        open_images(None, split="train")


def test_class_folders(tmp_path):
    root = class_folders(tmp_path / "data", each=2)
    write(root / "bee" / "deeper" / "x.PNG")
    (root / ".cache").mkdir()
    (root / "notes.txt").write_text("no picture")
    source = open_images(str(root))
    assert source.labelled
    assert source.classes == CLASSES
    assert labels(source) == [0, 0, 1, 1, 1, 2, 2]
    assert source.name(0) == str(root / "ant" / "0.png")
    assert source.read(4)[0].size == (20, 20)


def test_an_empty_class_keeps_its_number(tmp_path):
    root = class_folders(tmp_path, each=1)
    (root / "bat").mkdir()
    assert labels(open_images(root)) == [0, 2, 3]


def test_pictures_without_class_folders(tmp_path):
    write(tmp_path / "b.png")
    write(tmp_path / "a.png")
    write(tmp_path / "more" / "ü.png")
    source = open_images(tmp_path)
    assert not source.labelled
    assert source.classes is None
    assert names(source) == ["a.png", "b.png", "ü.png"]
    assert labels(source) == [None] * 3


@pytest.mark.parametrize(
    ("folders", "purpose", "split", "chosen"),
    [
        (["train", "val"], "search", None, "train"),
        (["train", "val", "meta"], "evaluation", None, "val"),
        (["Train", "Test"], "evaluation", None, "Test"),
        (["train", "validation", "test"], "evaluation", None, "validation"),
        (["val"], "search", None, "val"),
        (["train", "val"], "search", "val", "val"),
        (["fold1", "fold2"], "search", "fold2", "fold2"),
    ],
)
def test_a_folder_of_splits(tmp_path, folders, purpose, split, chosen):
    for folder in folders:
        class_folders(tmp_path / folder, each=1)
    source = open_images(tmp_path, split=split, purpose=purpose)
    assert source.where == str(tmp_path / chosen)
    assert source.classes == CLASSES


def test_one_class_may_have_the_name_of_a_split(tmp_path):
    assert open_images(class_folders(tmp_path, ["boat", "car", "train"])).classes == ["boat", "car", "train"]


def test_pictures_beside_a_folder_called_test(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "test" / "b.png")
    assert names(open_images(tmp_path)) == ["a.png", "b.png"]


def test_splits_that_do_not_suit(tmp_path):
    for folder in ("val", "test"):
        class_folders(tmp_path / folder, each=1)
    with pytest.raises(ValueError, match=r"several splits, and none is plainly for search; name one: test, val"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="no split 'train'; there are: test, val"):
        open_images(tmp_path, split="train")
    write(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="no split 'train'; there are: none"):
        open_images(tmp_path / "flat", split="train")


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no pictures"):
        open_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no pictures .* in the class folders"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png is a file, expected a folder"):
        open_images(write(tmp_path / "a.png"))


def hugging_face_dataset(classes=CLASSES, **columns):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes), "weight": datasets.Value("float32")}
    )
    content = {"image": pictures, "label": [2, 0, 1, 2], "weight": [1.0] * 4, **columns}
    return datasets.Dataset.from_dict(content, features=features), pictures


def test_a_saved_dataset(tmp_path):
    dataset, pictures = hugging_face_dataset()
    dataset.save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved")
    assert len(source) == 4
    assert source.classes == CLASSES
    assert labels(source) == [2, 0, 1, 2]
    assert all(np.array_equal(np.asarray(source.read(i)[0]), np.asarray(pictures[i])) for i in range(4))
    assert source.name(3).endswith("saved, row 3")
    assert labels(pickle.loads(pickle.dumps(source))) == [2, 0, 1, 2]
    with pytest.raises(ValueError, match="no split 'val'"):
        open_images(tmp_path / "saved", split="val")


def test_a_saved_dataset_of_several_splits(tmp_path):
    dataset, _ = hugging_face_dataset()
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=dataset, validation=dataset.select([1, 2])).save_to_disk(tmp_path)
    assert len(open_images(tmp_path)) == 4
    assert labels(open_images(tmp_path, purpose="evaluation")) == [0, 1]
    assert open_images(tmp_path, split="validation").where == f"{tmp_path} (split validation)"
    with pytest.raises(ValueError, match="no split 'test'; there are: train, validation"):
        open_images(tmp_path, split="test")


def test_saved_datasets_without_labels(tmp_path):
    dataset, _ = hugging_face_dataset()
    dataset.remove_columns("label").save_to_disk(tmp_path / "none")
    hugging_face_dataset(label=[-1] * 4)[0].save_to_disk(tmp_path / "unknown")
    for name, reason in (("none", "no column of type ClassLabel"), ("unknown", "labels .*'label' are missing")):
        source = open_images(tmp_path / name)
        assert labels(source) == [None] * 4
        with pytest.raises(ValueError, match=f"has no labels: .*{reason}"):
            match_classes(source, 3)


def test_saved_datasets_that_do_not_serve(tmp_path):
    dataset, _ = hugging_face_dataset()
    dataset.remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(ValueError, match="no column of type Image, only label: ClassLabel, weight: Value"):
        open_images(tmp_path / "blind")
    twice = dataset.rename_column("label", "fine").add_column("coarse", [0, 0, 0, 0], feature=dataset.features["label"])
    twice.save_to_disk(tmp_path / "twice")
    with pytest.raises(ValueError, match=r"several columns of type ClassLabel \(fine, coarse\): rename .* 'label'"):
        open_images(tmp_path / "twice")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"saved dataset .*damaged cannot be loaded"):
        open_images(tmp_path / "damaged")


def test_the_datasets_package_is_asked_for_by_name(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_images(tmp_path)


# Classes


def test_classes_of_the_model(tmp_path):
    source = open_images(class_folders(tmp_path / "data"))
    assert match_classes(source, 3) is source
    with pytest.raises(
        ValueError, match=r"3 classes \(ant, bee, cow\), but the model has 1000; soft targets .* no labels"
    ):
        match_classes(source, 1000)
    write(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match=r"has no labels: pictures lie in it directly.*soft targets"):
        match_classes(open_images(tmp_path / "flat"), 3)


def test_a_subset_of_imagenet_is_matched_by_name(tmp_path):
    # tench, English springer and parachute of Imagenette
    source = open_images(class_folders(tmp_path / "a", ["n01440764", "n02102040", "n03888257"], each=1))
    matched = match_classes(source, 1000)
    assert labels(matched) == [0, 217, 701]
    assert len(matched.classes) == 1000
    assert match_classes(source, 3) is source
    other = open_images(class_folders(tmp_path / "b", ["n01440764", "n99999999"], each=1))
    with pytest.raises(ValueError, match="not in ImageNet-1k: n99999999"):
        match_classes(other, 1000)


def test_labels_may_be_left_aside(tmp_path):
    source = without_labels(open_images(class_folders(tmp_path)))
    assert not source.labelled
    assert labels(source) == [None] * 9
    with pytest.raises(ValueError, match="its labels are not used"):
        match_classes(source, 3)


# Sampling


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


# Loaders


@pytest.fixture
def source(tmp_path):
    return open_images(class_folders(tmp_path / "source"))


def test_search_batches(source):
    loader = search_loader(source, Model(), batch_size=4, steps=5)
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
        return flat(search_loader(source, Model(), steps=5, seed=7, **{"batch_size": 8, **options}))

    whole = batches()
    assert_same(batches(workers=2), whole)
    assert_same(batches(start=3), whole[3:])
    ranks = [batches(batch_size=4, rank=rank, world=2) for rank in (0, 1)]
    joined = [[torch.cat(t) for t in zip(*step, strict=True)] for step in zip(*ranks, strict=True)]
    assert_same(joined, whole)
    other = flat(search_loader(source, Model(), batch_size=8, steps=1, seed=8))
    assert not torch.equal(other[0][0], whole[0][0])


def test_an_image_looks_different_in_every_epoch(tmp_path):
    write(tmp_path / "a.png")
    loader = search_loader(open_images(tmp_path), Model(), batch_size=1, steps=6, mixup=0, cutmix=0)
    assert len({images.numpy().tobytes() for images in loader}) == 6


def test_mixup_mixes_neighbours_and_their_labels_alike(tmp_path):
    for value, name in ((0, "black"), (255, "white")):
        for i in range(4):
            colour(tmp_path / name / f"{i}.png", value)
    source = open_images(tmp_path)
    loader = search_loader(
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
    loader = search_loader(
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
    plain = list(search_loader(source, Model(), smoothing=0, **options))
    assert [targets.tolist() for _, targets in plain] == expected
    assert plain[0][1].dtype == torch.int64
    for (_, targets), truth in zip(search_loader(source, Model(), smoothing=0.3, **options), expected, strict=True):
        torch.testing.assert_close(targets, torch.eye(3)[truth] * 0.7 + 0.1)


def test_without_labels_the_same_images_come_alone(source):
    with_labels = flat(search_loader(source, Model(), batch_size=4, steps=3))
    alone = flat(search_loader(without_labels(source), Model(), batch_size=4, steps=3))
    assert_same(alone, [[images] for images, _ in with_labels])


def test_the_global_generators_go_on_undisturbed(source):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    list(search_loader(source, Model(), batch_size=4, steps=3))
    list(evaluation_loader(source, Model(), batch_size=4))
    assert draw() == expected


def test_what_else_draws_random_numbers_changes_nothing(source):
    first = flat(search_loader(source, Model(), batch_size=4, steps=3))
    random.random(), np.random.rand(), torch.rand(1)
    assert_same(flat(search_loader(source, Model(), batch_size=4, steps=3)), first)


def test_grey_models_see_grey_pictures_lightly_augmented(source):
    model = embedded.build_model()
    for images in (source, open_images(None)):
        batch, _ = next(iter(search_loader(images, model, batch_size=4, steps=1)))
        assert batch.shape == (4, 1, 28, 28)
    embedded_images = without_labels(open_images(None))
    options = {"batch_size": 64, "steps": 1, "mixup": 0, "cutmix": 0}
    augmented, plain = (next(iter(search_loader(embedded_images, model, augment=a, **options))) for a in (True, False))
    flipped = plain.flip(-1)
    error = torch.stack([(augmented - p).square().mean((1, 2, 3)) for p in (plain, flipped)])
    # still the same picture or its mirror image, but changed: the typical square of a pixel is 1
    assert error.min(0).values.median() < 0.3
    assert error.min(0).values.median() > 1e-3
    assert 16 < int((error[0] < error[1]).sum()) < 48


def test_colour_pictures_are_augmented_as_in_deit(tmp_path):
    colour(tmp_path / "a.png", 100)
    loader = search_loader(open_images(tmp_path), Model(), batch_size=200, steps=1, mixup=0, cutmix=0)
    pixels = next(iter(loader)) * 0.25 + 0.5
    # erased parts are filled with normal noise, which no picture can hold; in a quarter of the images, +- 3 deviations
    noisy = ((pixels < -0.01) | (pixels > 1.01)).any(3).any(2).any(1)
    assert 0.15 < noisy.float().mean() < 0.35
    # flips and changes of colour leave it of one colour; 5 of RandAugment's 15 operations do not
    uneven = pixels[~noisy].flatten(2).std(2).amax(1) > 0.01
    assert 0.15 < uneven.float().mean() < 0.45


def test_randaugment_works_at_its_greatest_magnitude(source):
    transform = search_loader(source, Model(), batch_size=2, steps=1).transform
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
    assert next(iter(search_loader(tiny, Model(), batch_size=2, steps=1))).shape == (2, 3, 16, 16)
    assert next(iter(evaluation_loader(tiny, Model(), batch_size=2))).shape == (1, 3, 16, 16)


def test_colour_models_see_grey_pictures_too():
    batch, _ = next(iter(search_loader(open_images(None), Model(), batch_size=4, steps=1)))
    assert batch.shape == (4, 3, 16, 16)


def test_loaders_out_of_range(source):
    def load(model=None, **options):
        return search_loader(source, model or Model(), **{"batch_size": 4, "steps": 1, **options})

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


def test_image_size_of_a_model_made_for_another_one():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)
    assert data_config(model)["input_size"] == (3, 48, 48)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_all_images_in_order(workers):
    images, truth = embedded.load_images("test")
    source = open_images(None, split="test")
    loader = evaluation_loader(source, embedded.build_model(), batch_size=300, workers=workers)
    batches = flat(loader)
    assert len(loader) == len(batches) == 7
    torch.testing.assert_close(torch.cat([b[0] for b in batches]), embedded.normalize(images))
    assert torch.equal(torch.cat([b[1] for b in batches]), truth)
    alone = next(iter(evaluation_loader(without_labels(source), embedded.build_model(), batch_size=300)))
    assert torch.equal(alone, batches[0][0])


# Damaged pictures


@pytest.fixture
def damaged(tmp_path):
    for i in range(8):
        colour(tmp_path / "a" / f"{i}.png", 30 * i)
    for i in (2, 3, 7):
        (tmp_path / "a" / f"{i}.png").write_text("no picture")
    return open_images(tmp_path)


def brightness(batches) -> list[int]:
    return [round(float(v) * 255) for images, *_ in batches for v in (images * 0.25 + 0.5).mean((1, 2, 3))]


def warned(record) -> list[str]:
    return sorted(str(w.message) for w in record if "cannot be read" in str(w.message))


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_search_the_next_readable_picture_stands_in(damaged, workers):
    loader = search_loader(
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_leaves_unreadable_pictures_out(damaged, workers):
    with pytest.warns(UserWarning, match="cannot be read") as record:
        batches = flat(evaluation_loader(damaged, Model(), batch_size=2, workers=workers))
    assert brightness(batches) == [0, 30, 120, 150, 180]
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    assert [labels.tolist() for _, labels in batches] == [[0, 0], [0, 0], [0]]
    assert len(warned(record)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_when_no_picture_can_be_read(tmp_path, workers):
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_text("no picture")
    source = open_images(tmp_path)
    with pytest.raises(ValueError, match=r"^.*: 20 pictures in a row could not be read, the first of them .*\d\d\.png"):
        list(search_loader(source, Model(), batch_size=2, steps=1, workers=workers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="none of the 30 pictures could be read"):
            list(evaluation_loader(source, Model(), batch_size=8, workers=workers))
