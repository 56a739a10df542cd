"""Where images come from."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from picture_files import (
    CLASSES,
    class_folders,
    write,
)
from PIL import Image

from diffrate_ext import embedded
from diffrate_ext.images.sources import match_classes, open_images, some_of, spread_over, without_labels


def names(source) -> list[str]:
    return [Path(source.name(i)).name for i in range(len(source))]


def labels(source) -> list[int | None]:
    return [source.read(i)[1] for i in range(len(source))]


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
    with pytest.raises(ValueError, match=r"3 classes \(ant, bee, cow\), but the model has 1000$"):
        match_classes(source, 1000)
    write(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="has no labels: pictures lie in it directly"):
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


def test_some_of_the_pictures():
    source = open_images(None)
    part = spread_over(source, 4)
    assert [part.name(i) for i in range(len(part))] == [source.name(i) for i in (0, 250, 500, 750)]
    assert labels(part) == [source.read(i)[1] for i in (0, 250, 500, 750)]
    assert (part.where, part.classes) == (source.where, source.classes)
    assert spread_over(source, 1000) is source
    assert labels(some_of(source, [7])) == [source.read(7)[1]]
