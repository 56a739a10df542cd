"""What models say before and after compression."""

from __future__ import annotations

import timm
import torch
from tiny_models import tiny_images, tiny_vit
from torch import nn

from diffrate_ext import compressed_copy, embedded, uniform_schedule
from diffrate_ext.compression.flops import flops
from diffrate_ext.predictions import Prediction, class_names_of, predictions


class Says(nn.Module):
    """A classifier with an opinion of its own."""

    num_classes = 3

    def __init__(self, *logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits if not self.training else -self.logits


def test_classes_before_and_after():
    before = Says([0.0, 9.0, 0.0], [9.0, 0.0, 0.0])
    after = Says([0.0, 1.0, 0.0], [0.0, 0.0, 9.0])
    said = predictions(before, after.train(), torch.zeros(2, 1, 4, 4), ["ant", "bee", "cat"])
    assert "class" in said.heading
    assert said.of_images == [
        Prediction("bee, 100%", "bee, 58%", changed=False),
        Prediction("ant, 100%", "cat, 100%", changed=True),
    ]
    assert after.training


def test_without_classes_there_is_the_cosine_of_the_features():
    model = tiny_vit(num_classes=0).eval()
    images = tiny_images(model)
    compressed = compressed_copy(model, uniform_schedule(model, 0.7 * flops(model) / 1e9))
    said = predictions(model, compressed, images)
    with torch.no_grad():
        cosines = nn.functional.cosine_similarity(model(images), compressed.eval()(images))
    assert "cosine" in said.heading
    assert said.of_images == [Prediction(None, f"{cosine:.3f}", changed=False) for cosine in cosines.tolist()]
    assert cosines.max() < 0.9995  # else it could be anything's


def test_names_of_classes():
    assert class_names_of(embedded.build_model()) == embedded.CLASSES
    names = class_names_of(timm.create_model("test_vit"))
    assert names is not None
    assert (len(names), names[281]) == (1000, "tabby")
    assert class_names_of(tiny_vit()) is None


def test_classes_without_names_are_numbers():
    model = tiny_vit().eval()
    said = predictions(model, model, tiny_images(model))
    with torch.no_grad():
        classes = model(tiny_images(model)).argmax(1).tolist()
    starts = [text.before.partition(",")[0] for text in said.of_images if text.before is not None]
    assert starts == [f"class {index}" for index in classes]
