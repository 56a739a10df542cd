"""What a model says of images, before and after compression, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import embedded
from .answers import answer_of, has_classes
from .errors import InputValueError
from .models import adapter_for
from .modes import evaluating


class Prediction(NamedTuple):
    """Of one image."""

    before: str | None
    """None of a model without classes."""
    after: str
    changed: bool
    """Whether it is another class after compression."""


class Predictions(NamedTuple):
    """Of some images, and what to write above them."""

    heading: str
    of_images: list[Prediction]


def predictions(
    model: nn.Module, compressed: nn.Module, images: Tensor, class_names: Sequence[str] | None = None
) -> Predictions:
    """The most probable class of each image by both models; of models without classes how alike their features are.

    Args:
        model: uncompressed.
        compressed: the same model, compressed.
        images: (B, C, H, W), normalised as the models expect them.
        class_names: by index. Default: those of :func:`class_names_of`.

    Raises:
        InputValueError: another number of names than of classes.
    """
    with torch.no_grad(), evaluating(model, compressed):
        before, after = (answer_of(form(images)).float() for form in (model, compressed))
    if not has_classes(model):
        cosines = F.cosine_similarity(before.flatten(1), after.flatten(1), dim=1).tolist()
        of_images = [Prediction(None, f"{cosine:.3f}", changed=False) for cosine in cosines]
        return Predictions("features kept\n(cosine)", of_images)
    names = class_names_of(model) if class_names is None else class_names
    if names is not None and len(names) != before.shape[1]:
        raise InputValueError(f"got {len(names)} names of classes for {before.shape[1]} classes")
    changed = (before.argmax(1) != after.argmax(1)).tolist()
    texts = zip(_top_classes(before, names), _top_classes(after, names), changed, strict=True)
    return Predictions("predicted\nclass", [Prediction(*text) for text in texts])


def class_names_of(model: nn.Module) -> Sequence[str] | None:
    """Names of the classes of the embedded model, of timm's with the classes of ImageNet, and of transformers'."""
    if adapter_for(model).name == embedded.NAME:
        return embedded.CLASSES
    if (names := getattr(getattr(model, "config", None), "id2label", None)) is not None:
        return None if names[0] == "LABEL_0" else [names[index].partition(",")[0] for index in range(len(names))]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    # of "tabby, tabby cat" the first
    return [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]


def _top_classes(logits: Tensor, names: Sequence[str] | None) -> list[str]:
    probabilities, classes = logits.softmax(1).max(1)
    return [
        f"{f'class {index}' if names is None else names[index]}, {probability:.0%}"
        for probability, index in zip(probabilities.tolist(), classes.tolist(), strict=True)
    ]
