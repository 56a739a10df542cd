"""What is compressed, and on which pictures: a trained model, pictures to learn from, and others to be judged by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrate_ext import embedded
from diffrate_ext.evaluation import Batch
from diffrate_ext.images.loading import evaluation_loader
from diffrate_ext.images.sources import (
    ArrayImages,
    ImageSource,
    match_classes,
    open_images,
    some_of,
    spread_over,
    without_labels,
)
from diffrate_ext.model_loading import load_timm_model
from diffrate_ext.training.data import training_loader

from .dinov2 import LEARNED_FROM, PICTURES, SHOWN, WEIGHTS, Crops, dinov2, wheel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from train_embedded import read_split

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


@dataclass(frozen=True)
class Subject:
    """A model and its pictures."""

    name: str
    title: str
    make_model: Callable[[], Any]
    learn_from: Callable[[], ImageSource]
    judged_by: Callable[[], ImageSource]
    tune_on: Callable[[], ImageSource]
    """Pictures to fine-tune the weights on."""
    batch_size: int
    test_images: int
    tuning_lr: float = 2e-5
    """For 512 images in a step, as in the paper."""

    @cached_property
    def model(self) -> Any:
        return self.make_model().eval()

    @property
    def has_classes(self) -> bool:
        return bool(self.model.num_classes)

    def test_batches(self) -> Iterable[Batch]:
        """The pictures that models are judged by, evenly spread."""
        chosen = spread_over(self.judged_by(), self.test_images)
        return evaluation_loader(chosen, self.model, batch_size=50)

    def search_batches(self, images: int, steps: int, seed: int) -> Callable[[int], Iterable[Batch]]:
        """Batches of the first pictures to learn from, without labels: the uncompressed model says what is wanted."""
        source = without_labels(self.learn_from())
        chosen = some_of(source, range(min(images, len(source))))
        return self._loader(chosen, steps, seed, smoothing=0.0)

    def tuning_batches(self, steps: int, seed: int) -> Callable[[int], Iterable[Batch]]:
        source = self.tune_on()
        return self._loader(source if self.has_classes else without_labels(source), steps, seed, smoothing=0.1)

    def _loader(self, source: ImageSource, steps: int, seed: int, smoothing: float) -> Callable[[int], Iterable[Batch]]:
        plain: dict[str, Any] = {"augment": False, "mixup": 0.0, "cutmix": 0.0, "smoothing": smoothing}

        def loader(start: int) -> Iterable[Batch]:
            return training_loader(
                source, self.model, batch_size=self.batch_size, steps=steps, seed=seed, start=start, **plain
            )

        return loader


def fashion_mnist(folder: Path, test_images: int) -> Subject:
    """The embedded model, judged by pictures it never saw; without the data set by those that come with the package."""

    def split(name: str, embedded_purpose: Any) -> ImageSource:
        if not folder.is_dir():
            return open_images(None, purpose=embedded_purpose)
        return ArrayImages(f"Fashion-MNIST, {name}", embedded.CLASSES, *read_split(folder, name))

    return Subject(
        "fashion_mnist",
        "The embedded ViT (trained with labels) on Fashion-MNIST",
        embedded.load_model,
        learn_from=partial(open_images, None),
        judged_by=partial(split, "t10k", "evaluation"),
        tune_on=partial(split, "train", "search"),
        batch_size=32,
        test_images=test_images,
        tuning_lr=8e-4,  # the least of a few that moved this small model in 100 steps at all
    )


def dinov2_probe(folder: Path, test_images: int) -> Subject:
    """DINOv2 with a linear classifier on its features, trained on the uncompressed model's."""
    train = partial(open_images, None)

    def model() -> Any:
        found = dinov2(wheel(WEIGHTS, folder))
        head = folder / "probe.pt"
        if not head.exists():
            torch.save(train_probe(found, train()), head)
        found.reset_classifier(len(embedded.CLASSES))
        found.head.load_state_dict(torch.load(head, weights_only=True))
        return found

    return Subject(
        "dinov2_probe",
        "DINOv2 ViT-S/14 (self-supervised) with a linear probe, on Fashion-MNIST at 224 x 224",
        model,
        learn_from=train,
        judged_by=partial(open_images, None, purpose="evaluation"),
        tune_on=train,
        batch_size=8,
        test_images=test_images,
    )


def dinov2_photographs(folder: Path, crops: int) -> Subject:
    """DINOv2 without a head: what is kept of its features of photographs."""
    photographs = partial(wheel, PICTURES, folder)
    learn_from = lambda: Crops(photographs(), LEARNED_FROM, 125, seed=1)  # noqa: E731
    return Subject(
        "dinov2_photographs",
        "DINOv2 ViT-S/14 (self-supervised), features of crops of photographs",
        lambda: dinov2(wheel(WEIGHTS, folder)),
        learn_from=learn_from,
        judged_by=lambda: Crops(photographs(), SHOWN, crops, seed=0),
        tune_on=learn_from,
        batch_size=8,
        test_images=crops * len(SHOWN),
    )


def folder_of_pictures(model: str, path: Path, batch_size: int, test_images: int, *, pretrained: bool) -> Subject:
    """A model of timm on a data set with labels such as ImageNet, in folders or as saved by Hugging Face datasets."""

    @cache
    def loaded() -> Any:
        return load_timm_model(model, pretrained=pretrained)

    def source(purpose: Any) -> ImageSource:
        return match_classes(open_images(path, purpose=purpose), loaded().num_classes)

    return Subject(
        model.replace("/", "_"),
        f"{model} on {path.name}",
        loaded,
        learn_from=partial(source, "search"),
        judged_by=partial(source, "evaluation"),
        tune_on=partial(source, "search"),
        batch_size=batch_size,
        test_images=test_images,
    )


@torch.no_grad()
def _features(model: Any, source: ImageSource) -> tuple[Tensor, Tensor]:
    batches = list(evaluation_loader(source, model, batch_size=50))
    return torch.cat([model(images) for images, _ in batches]), torch.cat([labels for _, labels in batches])


def train_probe(model: Any, source: ImageSource, *, weight_decay: float = 1e-3, steps: int = 100) -> dict[str, Tensor]:
    """Weights of a linear classifier on a model's features (multinomial logistic regression)."""
    features, labels = _features(model, source)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / spread
    probe = torch.nn.Linear(x.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(x), labels) + weight_decay * probe.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    weight = probe.weight.detach() / spread  # for features as they come
    return {"weight": weight, "bias": probe.bias.detach() - weight @ mean}
