"""Where a search or an evaluation takes its images from: the embedded ones, folders, saved Hugging Face datasets."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ..errors import InputValueError
from .pictures import EXTENSIONS, find_pictures, read_picture

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Literal["search", "evaluation"]

# What each purpose takes from a folder or dataset that holds several, the first that is there.
_PREFERRED_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "search": ("train", "training"),
    "evaluation": ("val", "validation", "valid", "test"),
}
_SPLIT_NAMES = {name for names in _PREFERRED_SPLITS.values() for name in names}
_WNID = re.compile(r"n\d{8}")


class ImageSource(ABC):
    """A numbered collection of pictures, with labels or without; may be pickled for the workers of a DataLoader."""

    where: str
    """What it is, for messages: a path, with the split."""
    classes: list[str] | None
    """Names of the classes that labels count from 0; None without labels."""
    why_unlabelled: str = ""
    """Without labels, the reason in a few words."""

    @property
    def labelled(self) -> bool:
        return self.classes is not None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> tuple[Image.Image, int | None]:
        """Picture ``i``, "RGB" or "L", and its label. A damaged picture raises whatever its decoder raises."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Where picture ``i`` is, for messages."""


def open_images(path: str | Path | None, *, split: str | None = None, purpose: Purpose = "search") -> ImageSource:
    """The images under ``path``, whatever kind of collection it is.

    - None: the embedded images of Fashion-MNIST, split "search" or "test".
    - A Hugging Face dataset written by ``save_to_disk``: its Image column, and its ClassLabel column as labels.
    - A folder of class sub-folders, as ImageNet's: one class for each sub-folder, sorted by name.
    - Any other folder of pictures, with those in its sub-folders: without labels.

    A folder holds splits if at least two of its sub-folders, or its only one, are called train, training, val,
    validation, valid or test.

    Args:
        path: a folder, or None.
        split: the part of a dataset, or the sub-folder, to read. By default what suits the purpose: the training split
            for a search, the validation split (or else the test split) for an evaluation, or the only one there is.
        purpose: what the images are for.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        InputValueError: a file, an unknown split, several splits of which none suits, a dataset without images or with
            several image or label columns, or the ``datasets`` package is missing.
    """
    if path is None:
        return EmbeddedImages(split or ("search" if purpose == "search" else "test"))
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"no such folder of images: {root}")
    if not root.is_dir():
        raise InputValueError(f"{root} is a file, expected a folder of pictures or a dataset saved by save_to_disk")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _open_saved_dataset(root, split, purpose)
    return _open_folder(root, split, purpose)


def match_classes(source: ImageSource, num_classes: int | None) -> ImageSource:
    """The same pictures with the labels of a model of ``num_classes`` classes, or as they are where it does not tell.

    They count the classes in the same order, the sorted one of ImageNet and its likes. Classes named by WordNet ids
    ("n01440764") are looked up by name where the model has the 1,000 classes of ImageNet-1k, so that a subset serves.

    Raises:
        InputValueError: no labels, or other classes than the model's.
    """
    if source.classes is None:
        raise InputValueError(f"{source.where} has no labels: {source.why_unlabelled}")
    if num_classes == 1000 and all(_WNID.fullmatch(name) for name in source.classes):
        from timm.data import ImageNetInfo

        names = ImageNetInfo().label_names()
        number = {name: i for i, name in enumerate(names)}
        unknown = [name for name in source.classes if name not in number]
        if unknown:
            raise InputValueError(f"{source.where} has classes that are not in ImageNet-1k: {_some(unknown)}")
        return _Relabelled(source, list(names), [number[name] for name in source.classes])
    if num_classes is not None and len(source.classes) != num_classes:
        words = "1 class" if len(source.classes) == 1 else f"{len(source.classes)} classes"
        raise InputValueError(f"{source.where} has {words} ({_some(source.classes)}), but the model has {num_classes}")
    return source


def without_labels(source: ImageSource) -> ImageSource:
    """The same pictures without labels."""
    return _Relabelled(source, None, [])


def some_of(source: ImageSource, numbers: Sequence[int]) -> ImageSource:
    """Only the pictures with these numbers."""
    return _Part(source, numbers)


def spread_over(source: ImageSource, limit: int) -> ImageSource:
    """At most ``limit`` of the pictures, evenly spread: the first ones are often all of one class."""
    n = len(source)
    return source if n <= limit else some_of(source, [i * n // limit for i in range(limit)])


class _Part(ImageSource):
    def __init__(self, source: ImageSource, numbers: Sequence[int]) -> None:
        self.where, self.classes, self.why_unlabelled = source.where, source.classes, source.why_unlabelled
        self._source, self._numbers = source, np.array(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, i: int) -> tuple[Image.Image, int | None]:
        return self._source.read(int(self._numbers[i]))

    def name(self, i: int) -> str:
        return self._source.name(int(self._numbers[i]))


class _Relabelled(ImageSource):
    def __init__(self, source: ImageSource, classes: list[str] | None, labels: Sequence[int]) -> None:
        self.where, self.classes = source.where, classes
        self.why_unlabelled = source.why_unlabelled or "its labels are not used"
        self._source, self._labels = source, labels

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> tuple[Image.Image, int | None]:
        picture, label = self._source.read(i)
        return picture, None if self.classes is None or label is None else self._labels[label]

    def name(self, i: int) -> str:
        return self._source.name(i)


class ArrayImages(ImageSource):
    """Labelled grey images in memory: (n, 1, height, width) uint8, labels (n,)."""

    def __init__(self, where: str, classes: Sequence[str], images: Tensor, labels: Tensor) -> None:
        self.where, self.classes = where, list(classes)
        self._images, self._labels = images[:, 0].numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> tuple[Image.Image, int | None]:
        return Image.fromarray(self._images[i]), self._labels[i]

    def name(self, i: int) -> str:
        return f"{self.where}, number {i}"


class EmbeddedImages(ArrayImages):
    """The labelled images that come with the package, 28 x 28 pixels, "L"."""

    def __init__(self, split: str) -> None:
        from ..embedded import CLASSES, load_images

        if split not in ("search", "test"):
            raise InputValueError(f"the embedded images have the splits 'search' and 'test', got {split!r}")
        images = load_images("search" if split == "search" else "test")
        super().__init__(f"the embedded {split} images", CLASSES, *images)


class PictureFolder(ImageSource):
    """Picture files below a folder.

    Args:
        root: the folder.
        names: the files' paths below it.
        labels: one for each file, or None.
        classes: what the labels stand for, or None.
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None = None, classes: list[str] | None = None
    ) -> None:
        self.where, self.classes = str(root), classes
        self.why_unlabelled = "" if classes else "pictures lie in it directly, not in one sub-folder for each class"
        self._root = str(root)
        # arrays: the workers share their memory, while reading a list of a million strings would copy it to each
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = None if labels is None else np.array(labels)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> tuple[Image.Image, int | None]:
        return read_picture(Path(self.name(i))), None if self._labels is None else int(self._labels[i])

    def name(self, i: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._names[i]))


def _open_folder(root: Path, split: str | None, purpose: Purpose) -> PictureFolder:
    folders, pictures = _contents(root)
    splits = [name for name in folders if name.lower() in _SPLIT_NAMES]
    # one beside others may be a class: trains among cars and boats
    holds_splits = len(splits) >= 2 or (len(splits) == len(folders) == 1 and not pictures)
    if split is not None or holds_splits:
        root = root / _choose_split(str(root), folders if split is not None else splits, split, purpose)
        folders, pictures = _contents(root)
    if pictures or not folders:
        return PictureFolder(root, [str(path.relative_to(root)) for path in find_pictures(root)])

    from torchvision.datasets.folder import make_dataset

    numbers = {name: i for i, name in enumerate(folders)}
    samples = make_dataset(root, numbers, extensions=EXTENSIONS, allow_empty=True)
    if not samples:
        raise FileNotFoundError(f"no pictures ({', '.join(EXTENSIONS)}) in the class folders of {root}")
    start = len(os.path.join(root, ""))
    return PictureFolder(root, [path[start:] for path, _ in samples], [label for _, label in samples], folders)


def _contents(root: Path) -> tuple[list[str], bool]:
    """The sub-folders that are not hidden, sorted, and whether there are pictures beside them."""
    folders, pictures = [], False
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            else:
                pictures = pictures or entry.name.lower().endswith(EXTENSIONS)
    return sorted(name for name in folders if not name.startswith(".")), pictures


def _choose_split(where: str, found: Sequence[str], split: str | None, purpose: Purpose) -> str:
    if split is not None:
        if split not in found:
            raise InputValueError(f"{where} has no split {split!r}; there are: {_some(found) or 'none'}")
        return split
    by_name = {name.lower(): name for name in found}
    suitable = [by_name[name] for name in _PREFERRED_SPLITS[purpose] if name in by_name]
    if suitable or len(found) == 1:
        return [*suitable, *found][0]
    raise InputValueError(f"{where} has several splits, and none is plainly for {purpose}; name one: {_some(found)}")


class SavedDataset(ImageSource):
    """A Hugging Face dataset; the pictures are decoded as files are.

    Args:
        dataset: a ``datasets.Dataset``.
        where: what it is, for messages.
    """

    def __init__(self, dataset: Any, where: str) -> None:
        import datasets

        self.where = where
        self._column = _only_column(dataset, datasets.Image, ("image", "img"), where)
        if self._column is None:
            found = ", ".join(f"{name}: {type(kind).__name__}" for name, kind in dataset.features.items())
            raise InputValueError(f"{where} has no column of type Image, only {found or 'no columns at all'}")
        if len(dataset) == 0:
            raise InputValueError(f"{where} is empty")
        self._dataset = dataset.select_columns(self._column).cast_column(self._column, datasets.Image(decode=False))
        self.classes, self._labels = None, None
        label_column = _only_column(dataset, datasets.ClassLabel, ("label", "labels"), where)
        if label_column is None:
            self.why_unlabelled = "no column of type ClassLabel"
            return
        labels = dataset.select_columns(label_column)[:][label_column]
        if any(label is None or label < 0 for label in labels):  # so published test splits come
            self.why_unlabelled = f"some labels in the column {label_column!r} are missing"
            return
        self.classes, self._labels = list(dataset.features[label_column].names), np.array(labels)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> tuple[Image.Image, int | None]:
        stored = self._dataset[i][self._column]
        if stored is None:
            raise InputValueError("no picture in this row")
        content = stored["bytes"]
        picture = read_picture(Path(stored["path"]) if content is None else BytesIO(content))  # type: ignore[arg-type]
        return picture, None if self._labels is None else int(self._labels[i])

    def name(self, i: int) -> str:
        return f"{self.where}, row {i}"


def _open_saved_dataset(root: Path, split: str | None, purpose: Purpose) -> SavedDataset:
    try:
        import datasets
    except ImportError as error:
        raise InputValueError(f"{root} is a saved Hugging Face dataset; to read it, pip install datasets") from error
    try:
        dataset = datasets.load_from_disk(str(root))
    except Exception as error:  # whatever pyarrow and json raise on damaged files
        words = " ".join(str(error).split()) or type(error).__name__
        raise InputValueError(f"the saved dataset {root} cannot be loaded: {words}") from error
    where = str(root)
    if isinstance(dataset, datasets.DatasetDict):
        chosen = _choose_split(where, sorted(dataset), split, purpose)
        return SavedDataset(dataset[chosen], f"{where} (split {chosen})")
    if split is not None and split != str(dataset.split):
        raise InputValueError(f"{root} has no split {split!r}: it is one dataset, not a dictionary of splits")
    return SavedDataset(dataset, where)


def _only_column(dataset: Any, kind: type, usual: Sequence[str], where: str) -> str | None:
    """The column of this type; of several, the one with a usual name."""
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        named = [name for name in usual if name in found]
        if not named:
            raise InputValueError(
                f"{where} has several columns of type {kind.__name__} ({', '.join(found)}): "
                f"rename the one that is meant to {usual[0]!r}"
            )
        return named[0]
    return found[0] if found else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:4])}, ..., {names[-1]}"
